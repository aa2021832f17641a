"""What stays float between the operators of `ai.mptqc`: sets of values that must be of one type.

A stream holds what LayerNormQuantize reads, and what a Linear adds and then writes; standard operators that take
float16 as they take float32 join what they read to what they write. All else makes and reads float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import onnx_ir as ir

from mptqc.graph.edit import constant_of, is_op
from mptqc.graph.layout import MOVEMENT_OPS
from mptqc.graph.native_nodes import is_native

Use: TypeAlias = tuple[ir.Node, int]
"""A reader, and which of its inputs."""

NATIVE_OPS = ("LayerNormQuantize", "Linear")
"""Operators of `ai.mptqc` that take float16."""
RESIDUAL = 4
"""Input of a Linear."""

STANDARD_OPS: Mapping[str, slice] = MappingProxyType(
    dict.fromkeys((*MOVEMENT_OPS, "Expand", "ReduceMean"), slice(0, 1))
    | dict.fromkeys(("Concat", "Add", "Sub", "Mul", "Div", "LayerNormalization"), slice(None))
)
"""Operators that ONNX Runtime's CUDA provider has for float16, and which of their inputs have their output's type."""
TYPELESS_READERS = ("Shape", "Size")


@dataclass(frozen=True)
class Stream:
    """Values of one type, and its borders.

    Attributes:
        values: all but constants, in no order.
        made_elsewhere: those of `values` that their makers write in float32.
        wanted_elsewhere: those of `values` that someone reads in float32, or that are outputs of the graph.
        uses: where values, and constants beside them, are read in the stream's type.
        operators: how many of the uses are those of operators of `ai.mptqc`.
    """

    values: Sequence[ir.Value]
    made_elsewhere: Sequence[ir.Value]
    wanted_elsewhere: Sequence[ir.Value]
    uses: Sequence[Use]
    operators: int


def find_streams(model: ir.Model) -> list[Stream]:
    """Every stream that an operator of `ai.mptqc` reads or adds, in graph order."""
    streams: list[Stream] = []
    taken: set[ir.Value] = set()
    for node in model.graph:
        for index in typed_inputs(node) if is_native(node, *NATIVE_OPS) else ():
            value = node.inputs[index]
            if value is not None and value not in taken and constant_of(value) is None:
                streams.append(_stream_of(value))
                taken.update(streams[-1].values)
    return streams


def typed_inputs(node: ir.Node) -> list[int]:
    """Inputs that may be float16; the output then is too, if it is float."""
    if is_native(node, "LayerNormQuantize"):
        return [0]
    if is_native(node, "Linear"):
        return [RESIDUAL] if len(node.inputs) > RESIDUAL and node.inputs[RESIDUAL] is not None else []
    if is_op(node, *STANDARD_OPS):
        return list(range(len(node.inputs)))[STANDARD_OPS[node.op_type]]
    return []


def _stream_of(seed: ir.Value) -> Stream:
    """All that is connected with one value."""
    values, frontier, uses = {seed: None}, [seed], dict[Use, None]()
    made_elsewhere, wanted_elsewhere = [], []

    def join(node: ir.Node) -> None:
        found = [] if is_native(node, "LayerNormQuantize") else list(node.outputs[:1])
        for index in typed_inputs(node):
            uses[node, index] = None
            value = node.inputs[index]
            if value is not None and constant_of(value) is None:
                found.append(value)
        frontier.extend(value for value in found if value not in values)
        values.update(dict.fromkeys(found))

    while frontier:
        value = frontier.pop()
        maker = value.producer()
        if maker is None or not typed_inputs(maker):
            made_elsewhere.append(value)
        else:
            join(maker)
        readers = [use for use in value.uses() if not is_op(use.node, *TYPELESS_READERS)]
        for reader in readers:
            if reader.idx in typed_inputs(reader.node):
                join(reader.node)
        if value.is_graph_output() or any(reader.idx not in typed_inputs(reader.node) for reader in readers):
            wanted_elsewhere.append(value)
    operators = sum(is_native(node, *NATIVE_OPS) for node, _ in uses)
    return Stream(list(values), made_elsewhere, wanted_elsewhere, list(uses), operators)
