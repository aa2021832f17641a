"""Store integer weights in k/8 bytes each.

    W int8 [K, N]
 => planes uint8 -> Cast -> Gather(table) -> (Slice ->) Reshape [K, N], summed over the planes

ONNX Runtime computes these constants once, when the session is created. 8-bit weights stay as they are.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder, constant_of, is_op, remove_dead
from mptqc.graph.emission import weight_bits_of
from mptqc.graph.match import site_of
from mptqc.graph.packed_weights import emit_packed
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.reference.packing import MAX_BITS


@dataclass(frozen=True)
class PackWeights(Pass):
    """Pack the weights of every integer Linear to its number of bits; the model is quantized after it."""

    name: ClassVar[str] = "pack-weights"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.SMOOTHED,)
    ensures: ClassVar[Stage | None] = Stage.QUANTIZED

    def call(self, model: ir.Model) -> PassResult:
        """Find all products whose weights have less than 8 bits, then pack those."""
        found = [node for node in find_integer_linears(model) if weight_bits_of(node) < MAX_BITS]
        for node in found:
            codes = constant_of(node.inputs[1])
            assert codes is not None
            build = Builder(node, f"{site_of(node)}/unpack")
            node.replace_input_with(1, emit_packed(codes.astype(np.int8, copy=False), weight_bits_of(node), build))
        remove_dead(model)
        return PassResult(model, len(found))


def find_integer_linears(model: ir.Model) -> list[ir.Node]:
    """MatMulInteger nodes with constant weights that the quantize passes wrote, in graph order."""
    return [
        node
        for node in model.graph
        if is_op(node, "MatMulInteger") and site_of(node) and constant_of(node.inputs[1]) is not None
    ]
