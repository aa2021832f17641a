"""Bring the heads of a context together by one Transpose and one Reshape, whatever the exporter took for it.

    context [B, h, T, d] → any movement → x [B, T, h·d]        →        Transpose 0213 → Reshape [0, 0, h·d]

A second run finds nothing new.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder, producer, remove_dead
from mptqc.graph.layout import Shapes, trace
from mptqc.graph.match import Linear, find_attentions, find_linears
from mptqc.passes.base import Pass, PassResult

_JOINED = (0, 2, 1, 3)


@dataclass(frozen=True)
class JoinHeads(Pass):
    """Rebuild what lies between each attention and the Linears that read all its heads side by side.

    Attributes:
        shapes: the shape of every value at batch 2, at which it is seen that no row moves from image to image.
    """

    name: ClassVar[str] = "join-heads"
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Find all Linears behind an attention, then rebuild their inputs."""
        contexts = {attention.context.outputs[0] for attention in find_attentions(model)}
        found = [
            (linear, source)
            for linear in find_linears(model)
            if (source := self._context(linear)) in contexts and source is not None
        ]
        for linear, source in found:
            _rebuild(linear, source, self.shapes)
        if found:
            remove_dead(model)
        return PassResult(model, len(found))

    def _context(self, linear: Linear) -> ir.Value | None:
        """The value [B, h, T, d] whose heads the Linear reads side by side, in a longer way than one."""
        reshape = producer(linear.input, "Reshape")
        transpose = None if reshape is None else producer(reshape.inputs[0], "Transpose")
        moved = trace(linear.input, self.shapes)
        shape = self.shapes[str(moved.source.name)]
        if len(shape) != 4 or moved.index.ndim != 3 or moved.index.shape[:2] != (shape[0], shape[2]):
            return None
        if transpose is not None and transpose.inputs[0] is moved.source:
            return None
        straight = np.arange(moved.index.size).reshape(shape).transpose(_JOINED)
        return moved.source if np.array_equal(moved.index.reshape(-1), straight.reshape(-1)) else None


def _rebuild(linear: Linear, source: ir.Value, shapes: Shapes) -> None:
    build = Builder(linear.matmul, f"{linear.matmul.name}/heads")
    side_by_side = build.op("Transpose", [source], {"perm": list(_JOINED)}, name="side_by_side")
    width = shapes[str(linear.input.name)][-1]
    joined = build.op(
        "Reshape", [side_by_side, build.constant("joined", np.array([0, 0, width], np.int64))], name="join"
    )
    joined.shape, joined.type = linear.input.shape, linear.input.type
    linear.matmul.replace_input_with(0, joined)
