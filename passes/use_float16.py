"""Let what stays float between the operators of `ai.mptqc` run in float16, for CUDA.

    float32 maker -> stream -> float32 reader  =>  float32 maker -> Cast -> stream in float16 -> Cast -> float32 reader

A stream (`graph.float_streams`) is converted where more operators of `ai.mptqc` read or add its values than Casts are
needed at its borders, and no constant of it is beyond float16. Weights, scales, quantizers, attentions' biases and
masks, and the graph's inputs and outputs stay as they are. A second run finds nothing: streams are of float16 then.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import constant_of, insert_cast, is_op, replace_output, set_initializer
from mptqc.graph.float_streams import TYPELESS_READERS, Stream, Use, find_streams
from mptqc.passes.base import Pass, PassResult, Stage

LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class UseFloat16(Pass):
    """Convert every stream that is worth it."""

    name: ClassVar[str] = "use-float16"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.LOWERED,)

    def call(self, model: ir.Model) -> PassResult:
        """Find all streams, then convert them."""
        streams = [stream for stream in find_streams(model) if _is_worth_it(stream)]
        for stream in streams:
            _convert(stream)
        return PassResult(model, len(streams))


def _is_worth_it(stream: Stream) -> bool:
    casts = len({*stream.made_elsewhere, *stream.wanted_elsewhere})
    done = any(value.dtype == ir.DataType.FLOAT16 for value in stream.values)
    return not done and casts < stream.operators and all(_fits(array) for _, array in _constants(stream))


def _constants(stream: Stream) -> list[tuple[Use, NDArray[np.generic]]]:
    """What the stream reads of constants."""
    found = [(use, constant_of(use[0].inputs[use[1]])) for use in stream.uses]
    return [(use, array) for use, array in found if array is not None]


def _fits(array: NDArray[np.generic]) -> bool:
    return array.dtype == np.float32 and bool((np.abs(array) <= LARGEST).all())


def _convert(stream: Stream) -> None:
    for (node, index), array in _constants(stream):
        set_initializer(node, index, array.astype(np.float16))
    elsewhere = set(stream.made_elsewhere)
    for value in stream.made_elsewhere:
        narrowed = insert_cast(value, ir.DataType.FLOAT16)
        for node, index in stream.uses:
            if node.inputs[index] is value:
                node.replace_input_with(index, narrowed)
    for value in stream.values:
        if value not in elsewhere:
            value.dtype = ir.DataType.FLOAT16
    inside = set(stream.uses)
    for value in stream.wanted_elsewhere:
        if value not in elsewhere:
            _widen(value, inside)


def _widen(value: ir.Value, inside: set[Use]) -> None:
    """Let who is outside the stream read a float32 copy of the value."""
    outside = [
        use for use in value.uses() if (use.node, use.idx) not in inside and not is_op(use.node, *TYPELESS_READERS)
    ]
    widened = insert_cast(value, ir.DataType.FLOAT)
    for use in outside:
        use.node.replace_input_with(use.idx, widened)
    if value.is_graph_output():
        replace_output(value, widened)
