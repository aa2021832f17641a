"""Give a gate and what it gates a Linear each, where an exporter has one for both (SwiGLU's w12, GEGLU).

    Linear(x) [.., 2N] -> Split -> g, v;  activation(g)·v        =>        Linear_0(x) -> g,  Linear_1(x) -> v

Exact: columns are only picked. Apart, each has its own site, and a scale of the product's channels can be folded into
the Linear that is gated. A Linear that is read in any other way than by runs of its columns is left as it is; a second
run finds nothing new.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder, is_op, only_consumer, remove_dead, replace_value
from mptqc.graph.layout import Shapes, readers
from mptqc.graph.match import Linear, find_linears
from mptqc.passes.base import Pass, PassResult
from mptqc.passes.separate_projections import emit_columns


@dataclass(frozen=True)
class PartGates(Pass):
    """Part the Linears whose output is split over its columns and met again in a Mul."""

    name: ClassVar[str] = "part-gates"
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Find all such Linears, then part them."""
        found = [(linear, parts) for linear in find_linears(model) if (parts := _parts(linear, self.shapes))]
        for linear, parts in found:
            for index, (value, columns) in enumerate(parts.items()):
                _rebuild(linear, value, columns, index)
        if found:
            remove_dead(model)
        return PassResult(model, len(found))


def _parts(linear: Linear, shapes: Shapes) -> dict[ir.Value, slice]:
    """The values that are read of a Linear, and the columns that each of them is; empty if one is no run of columns."""
    if not any(is_op(node, "Split", "Slice") for node in linear.output.consumers()):
        return {}
    found = {}
    for reader in readers(linear.output, shapes):
        index, width = reader.trace.index, shapes[str(linear.output.name)][-1]
        if reader.node is None or index.ndim != len(shapes[str(linear.output.name)]) or index.size == 0:
            return {}
        first = int(index.reshape(-1)[0])
        columns = slice(first, first + index.shape[-1])
        whole = np.arange(index.size // index.shape[-1] * width).reshape(*index.shape[:-1], width)
        if columns.stop > width or not np.array_equal(index, whole[..., columns]):
            return {}
        found[reader.value] = columns
    widths = [columns.stop - columns.start for columns in found.values()]
    apart = len(found) > 1 and sum(widths) == shapes[str(linear.output.name)][-1]
    return found if apart and any(is_op(only_consumer(value), "Mul") for value in found) else {}


def _rebuild(linear: Linear, value: ir.Value, columns: slice, index: int) -> None:
    node = value.producer()
    assert node is not None, "what is moved from a Linear is made by a node"
    build = Builder(node, f"{linear.matmul.name}/part{index}")
    replace_value(value, emit_columns(linear, columns, build))
