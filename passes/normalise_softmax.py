"""Write the last axis of every Softmax as -1."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.edit import is_op
from mptqc.graph.shapes import is_last_axis
from mptqc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class NormaliseSoftmax(Pass):
    """Softmax(x; axis=3), x of rank 4, → Softmax(x; axis=-1); other axes stay. One run is a fixpoint."""

    name: ClassVar[str] = "normalise-softmax"

    def call(self, model: ir.Model) -> PassResult:
        """Set the attribute where the axis is surely the last one."""
        sites = [node for node in model.graph if is_op(node, "Softmax") and _can_change(node)]
        for node in sites:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return PassResult(model, len(sites))


def _can_change(node: ir.Node) -> bool:
    axis = node.attributes.get_int("axis", None)
    return axis is None or (axis != -1 and is_last_axis(axis, node.inputs[0]))
