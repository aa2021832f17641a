"""Store integer weights in k/8 bytes each.

    W int8 [K, N]
 => planes uint8 -> Cast -> Gather(table) -> (Slice ->) Reshape [K, N], summed over the planes

ONNX Runtime computes these constants once, when the session is created. 8-bit weights stay as they are. See
`mptqc.reference.packing` for the layout.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder, add_initializer, constant_of, is_op, remove_dead
from mptqc.graph.emission import weight_bits_of
from mptqc.graph.match import site_of
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.reference.packing import MAX_BITS, Plane, pack, planes_of


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
            _pack(node, weight_bits_of(node), site_of(node))
        remove_dead(model)
        return PassResult(model, len(found))


def find_integer_linears(model: ir.Model) -> list[ir.Node]:
    """MatMulInteger nodes with constant weights that the quantize passes wrote, in graph order."""
    return [
        node
        for node in model.graph
        if is_op(node, "MatMulInteger") and site_of(node) and constant_of(node.inputs[1]) is not None
    ]


def _pack(node: ir.Node, bits: int, site: str) -> None:
    codes = constant_of(node.inputs[1])
    assert codes is not None
    build = Builder(node, f"{site}/unpack")
    shape = build.constant("shape", np.array(codes.shape, np.int64))
    parts = []
    for plane, content in zip(planes_of(bits), pack(codes.astype(np.int8, copy=False), bits), strict=True):
        label = f"bit{plane.shift}"
        index = build.op(
            "Cast", [build.constant(label, content)], {"to": int(ir.DataType.INT32)}, name=f"{label}_index"
        )
        part = build.op("Gather", [_table(build.graph, plane), index], name=f"{label}_codes")
        if content.size * plane.codes_per_byte != codes.size:
            part = _cut(part, codes.size, label, build)
        parts.append(build.op("Reshape", [part, shape], name=f"{label}_shaped"))
    total = parts[0]
    for number, part in enumerate(parts[1:]):
        total = build.op("Add", [total, part], name=f"add{number}")
    total.shape, total.dtype = ir.Shape(codes.shape), ir.DataType.INT8
    node.replace_input_with(1, total)


def _cut(part: ir.Value, size: int, label: str, build: Builder) -> ir.Value:
    """The first `size` codes: the last byte of a plane may be partly filled."""
    flat = build.op("Reshape", [part, build.constant(f"{label}_flat", np.array([-1], np.int64))], name=f"{label}_flat")
    bounds = [build.constant(f"{label}_{name}", np.array([at], np.int64)) for name, at in (("start", 0), ("end", size))]
    return build.op("Slice", [flat, *bounds], name=f"{label}_cut")


def _table(graph: ir.Graph, plane: Plane) -> ir.Value:
    """One table for all weights that have such a plane."""
    name = f"mptqc/table_bit{plane.shift}_width{plane.width}{'_signed' if plane.signed else ''}"
    return graph.initializers.get(name) or add_initializer(graph, name, plane.table())
