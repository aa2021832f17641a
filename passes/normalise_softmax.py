"""Write the last axis of every Softmax as -1, and leave out what guards it against rows that are masked as a whole."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import constant_of, is_op, producer, remove_dead, replace_value, scalar_of
from mptqc.graph.shapes import is_last_axis, last_dim
from mptqc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class NormaliseSoftmax(Pass):
    """Softmax(x; axis=3), x of rank 4, → Softmax(x; axis=-1); other axes stay. One run is a fixpoint.

    p = Softmax(Add(scores, mask))
    y = Where(IsNaN(p), 0, p)             →    y = p            mask constant, no row of it -inf all along
    """

    name: ClassVar[str] = "normalise-softmax"

    def call(self, model: ir.Model) -> PassResult:
        """Set the attribute where the axis is surely the last one; drop the guards that never act."""
        sites = [node for node in model.graph if is_op(node, "Softmax") and _can_change(node)]
        for node in sites:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        guards = [node for node in model.graph if _never_acts(node)]
        for node in guards:
            softmax = node.inputs[2]
            assert softmax is not None
            replace_value(node.outputs[0], softmax)
        if guards:
            remove_dead(model)
        return PassResult(model, len(sites) + len(guards))


def _can_change(node: ir.Node) -> bool:
    axis = node.attributes.get_int("axis", None)
    return axis is None or (axis != -1 and is_last_axis(axis, node.inputs[0]))


def _never_acts(node: ir.Node) -> bool:
    """Where(IsNaN(p), 0, p), p the Softmax of a product, or of one and constants that mask no row as a whole."""
    if not is_op(node, "Where") or scalar_of(node.inputs[1]) != 0 or node.outputs[0].is_graph_output():
        return False
    asked, softmax = producer(node.inputs[0], "IsNaN"), producer(node.inputs[2], "Softmax")
    if asked is None or softmax is None or asked.inputs[0] is not node.inputs[2]:
        return False
    return _masks_no_row(softmax.inputs[0])


def _masks_no_row(scores: ir.Value | None) -> bool:
    """True if what is added to a product on its way here is constant, and leaves something in each row."""
    infinite = 0
    while (node := producer(scores, "Add", "Mul", "Div", "Reshape", "MatMul")) is not None:
        if is_op(node, "MatMul"):
            return infinite <= 1
        first, constant = node.inputs[0], constant_of(node.inputs[1])
        if is_op(node, "Reshape"):
            if last_dim(first) is None or last_dim(first) != last_dim(node.outputs[0]):
                return False
            scores = first
            continue
        if constant is None and not is_op(node, "Div"):
            first, constant = node.inputs[1], constant_of(node.inputs[0])
        if constant is None:
            return False
        if is_op(node, "Add"):
            infinite += not np.isfinite(constant).all()
            if constant.ndim == 0 or not np.isfinite(constant).any(axis=-1).all():
                return False
        elif not np.isfinite(constant).all() or not constant.all():
            return False
        scores = first
    return False
