"""Integer weights in k/8 bytes each, as bit planes that ONNX Runtime widens once, when the session is created.

planes uint8 -> Cast -> Gather(table) -> (Slice ->) Reshape, summed over the planes

See `mptqc.reference.packing` for the layout.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, add_initializer
from mptqc.reference.packing import Plane, pack, planes_of


def emit_packed(codes: NDArray[np.int8], bits: int, build: Builder) -> ir.Value:
    """Write codes of any shape as planes and the ops that widen them; returns the int8 value, of the codes' shape.

    Raises:
        ValueError: a code does not fit `bits`.
    """
    shape = build.constant("shape", np.array(codes.shape, np.int64))
    parts = []
    for plane, content in zip(planes_of(bits), pack(codes, bits), strict=True):
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
    return total


def _cut(part: ir.Value, size: int, label: str, build: Builder) -> ir.Value:
    """The first `size` codes: the last byte of a plane may be partly filled."""
    flat = build.op("Reshape", [part, build.constant(f"{label}_flat", np.array([-1], np.int64))], name=f"{label}_flat")
    bounds = [build.constant(f"{label}_{name}", np.array([at], np.int64)) for name, at in (("start", 0), ("end", size))]
    return build.op("Slice", [flat, *bounds], name=f"{label}_cut")


def _table(graph: ir.Graph, plane: Plane) -> ir.Value:
    """One table for all weights that have such a plane."""
    name = f"mptqc/table_bit{plane.shift}_width{plane.width}{'_signed' if plane.signed else ''}"
    return graph.initializers.get(name) or add_initializer(graph, name, plane.table())
