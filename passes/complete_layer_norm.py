"""Write γ, β and the axis of every LayerNormalization over the last axis in one way."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import add_initializer, constant_of, is_op
from mptqc.graph.shapes import is_last_axis
from mptqc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class CompleteLayerNorm(Pass):
    """Give a LayerNormalization over the last axis axis=-1 and an explicit β. One run is a fixpoint.

    y = LayerNormalization(x, γ; axis=2)    →    y = LayerNormalization(x, γ, 0; axis=-1)

    A norm over more axes, or with a γ that is not a constant vector, stays as it is.
    """

    name: ClassVar[str] = "complete-layer-norm"

    def call(self, model: ir.Model) -> PassResult:
        """Find all, then edit all."""
        sites = [node for node in model.graph if is_op(node, "LayerNormalization") and _is_over_last_axis(node)]
        return PassResult(model, sum(_complete(model.graph, node) for node in sites))


def _is_over_last_axis(node: ir.Node) -> bool:
    gamma, axis = constant_of(node.inputs[1]), node.attributes.get_int("axis", -1)
    return gamma is not None and gamma.ndim == 1 and axis is not None and is_last_axis(axis, node.inputs[0])


def _complete(graph: ir.Graph, node: ir.Node) -> bool:
    """Edit one node; True if that changed it."""
    changed = False
    if "axis" not in node.attributes or node.attributes["axis"].as_int() != -1:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        changed = True
    if len(node.inputs) < 3 or node.inputs[2] is None:
        gamma = constant_of(node.inputs[1])
        assert gamma is not None
        beta = add_initializer(graph, f"{node.name or node.outputs[0].name}/beta", np.zeros_like(gamma))
        node.resize_inputs(3)
        node.replace_input_with(2, beta)
        changed = True
    return changed
