"""Give q, k and v a Linear each, whatever the exporter did between the fused projection and the products.

    Linear(x) [L, T, 3C] -> any movement -> q [L, h, T, d], k [L, h, d, T], v [L, h, T, d]
 => Linear_q(x) -> Reshape [0, 0, h, d] -> Transpose 0213 -> q,  k: Transpose 0231,  v: as q

The columns of each new weight are ordered (head, channel of head). Exact: columns are only picked. Separate projections
let each operand be quantized before it is transposed, and let folds speak of q, k and v alone. If q and k are normed on
their way, what is normed [L, h, T, d] is rebuilt so, and the joint Linear goes. An operand whose elements cannot be
followed to the columns of one Linear is left as it is. A second run finds nothing new.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, remove_dead, replace_value
from mptqc.graph.layout import Shapes, readers, trace
from mptqc.graph.match import Linear, find_attentions, match_linear_output
from mptqc.passes.base import Pass, PassResult

QUERY_LAYOUT = (0, 2, 1, 3)
KEY_LAYOUT = (0, 2, 3, 1)


@dataclass(frozen=True)
class Projection:
    """`value` is the product's operand; `columns` [h, d] are the Linear's columns it is made of."""

    letter: str
    value: ir.Value
    linear: Linear
    columns: NDArray[np.int64]
    layout: tuple[int, ...]


@dataclass(frozen=True)
class SeparateProjections(Pass):
    """Rebuild q, k and v as a Linear, a Reshape and a Transpose each."""

    name: ClassVar[str] = "separate-projections"
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Find all projections, then rebuild them."""
        found = find_projections(model, self.shapes)
        for projection in found:
            _rebuild(projection)
        if found:
            remove_dead(model)
        return PassResult(model, len(found))


def find_projections(model: ir.Model, shapes: Shapes) -> list[Projection]:
    """Every operand q, k, v that is pure movement of a Linear's columns and not yet in the separate form."""
    found = []
    for attention in find_attentions(model):
        for letter, value in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
            layout = KEY_LAYOUT if letter == "k" else QUERY_LAYOUT
            projection = _match(letter, value, layout, shapes)
            if projection is not None:
                found.append(projection)
    return found + _read_on_the_way(found, shapes)


def _read_on_the_way(found: list[Projection], shapes: Shapes) -> list[Projection]:
    """What else is read of the Linears that operands are parted from, if all of it are heads [L, h, T, d]."""
    more: dict[ir.Value, Projection] = {}
    for linear in {projection.linear.matmul: projection.linear for projection in found}.values():
        operands = {projection.value for projection in found if projection.linear.matmul is linear.matmul}
        read = dict.fromkeys(reader.value for reader in readers(linear.output, shapes))
        parts = [_match("part", value, QUERY_LAYOUT, shapes) for value in read if value not in operands]
        if all(part is not None for part in parts):
            more |= {part.value: part for part in parts if part is not None}
    return list(more.values())


def _match(letter: str, value: ir.Value, layout: tuple[int, ...], shapes: Shapes) -> Projection | None:
    moved = trace(value, shapes)
    linear = match_linear_output(moved.source)
    if linear is None or moved.index.ndim != 4:
        return None
    source_shape = shapes[str(moved.source.name)]
    if len(source_shape) != 3 or source_shape[:2] != shapes[str(linear.input.name)][:2]:
        return None
    rows, tokens, width = source_shape
    index = np.transpose(moved.index, np.argsort(layout))
    if index.shape[:2] != (rows, tokens):
        return None
    columns = index[0, 0] % width
    row_starts = (np.arange(rows * tokens) * width).reshape(rows, tokens, 1, 1)
    if not np.array_equal(index, row_starts + columns):
        return None
    if columns.size == width and np.array_equal(columns.reshape(-1), np.arange(width)) and _is_separate(value):
        return None
    return Projection(letter, value, linear, columns, layout)


def _is_separate(value: ir.Value) -> bool:
    """True if the operand is already Linear -> Reshape -> Transpose."""
    transpose = value.producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        return False
    reshape = transpose.inputs[0].producer()
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is None:
        return False
    return match_linear_output(reshape.inputs[0]) is not None


def _rebuild(projection: Projection) -> None:
    linear, columns = projection.linear, projection.columns.reshape(-1)
    node = projection.value.producer()
    assert node is not None
    build = Builder(node, f"{linear.matmul.name}/{projection.letter}")
    shifted = emit_columns(linear, columns, build)
    heads = build.constant("heads", np.array([0, 0, *projection.columns.shape], np.int64))
    split = build.op("Reshape", [shifted, heads])
    replace_value(projection.value, build.op("Transpose", [split], {"perm": list(projection.layout)}))


def emit_columns(linear: Linear, columns: NDArray[np.int64] | slice, build: Builder) -> ir.Value:
    """A Linear of some of the columns of another: its output [.., N']."""
    weight = build.constant("weight", linear.weight[:, columns])
    bias = build.constant("bias", linear.bias[columns])
    return build.op("Add", [build.op("MatMul", [linear.input, weight]), bias])
