"""Divide the channels of a GELU's output, or of a gated product, by s; give the inverse to every Linear that reads it.

y = Gelu(x),  z = yW + B              =>      y' = Gelu(x)·(1/s),  W' = diag(s)·W
y = silu(g)·(xV + b),  z = yW + B     =>      V' = V·diag(1/s),  b' = b/s,  W' = diag(s)·W

s [K]; W [K, N]; V [C, K]; b [K]. Exact in real arithmetic. GELU is not linear, so that 1/s costs a Mul (the kernel
library takes it into the product before); a gated product costs nothing. A planned GELU that is scaled already is
refused: a second run would scale it twice. (A gated product would take a second scale in as it did the first.)
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import PlanError
from mptqc.graph.blocks import Activation, find_activations
from mptqc.graph.edit import add_initializer, set_initializer
from mptqc.graph.layout import Shapes
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.plan import QuantPlan


@dataclass(frozen=True)
class FoldGelu(Pass):
    """Put the plan's scales between GELUs or gated products and their Linears."""

    name: ClassVar[str] = "fold-gelu"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.SMOOTHED,)
    plan: QuantPlan
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Fold every planned GELU.

        Raises:
            PlanError: a planned GELU is not in the model, or its array does not fit it.
        """
        activations = {activation.site: activation for activation in find_activations(model, self.shapes)[0]}
        missing = [fold.site for fold in self.plan.gelu_folds if fold.site not in activations]
        if missing:
            raise PlanError(
                f"the plan scales the input of {', '.join(missing)}, which is no output of a GELU or gate in the "
                "model; the plan belongs to another model"
            )
        found = [(activations[fold.site], self._scale(activations[fold.site])) for fold in self.plan.gelu_folds]
        for activation, scale in found:
            _fold(activation, scale)
        return PassResult(model, len(found))

    def _scale(self, activation: Activation) -> NDArray[np.float32]:
        width = self.shapes[str(activation.output.name)][-1]
        return self.plan.scales(f"{activation.site}/input_scale", (width,))


def _fold(activation: Activation, scale: NDArray[np.float32]) -> None:
    for linear in activation.linears:
        set_initializer(linear.matmul, 1, (scale[:, None] * linear.weight).astype(np.float32))
    if activation.gated is not None:
        set_initializer(activation.gated.matmul, 1, (activation.gated.weight / scale).astype(np.float32))
        set_initializer(activation.gated.add, activation.gated.bias_index, activation.gated.bias / scale)
        return
    graph, output = activation.node.graph, activation.output
    assert isinstance(graph, ir.Graph)
    readers = list(output.uses())
    inverse = add_initializer(graph, f"{activation.site}/inverse_input_scale", 1 / scale)
    scaled = ir.node("Mul", [output, inverse], name=f"{activation.site}/scaled_input")
    scaled.outputs[0].name = f"{activation.site}/scaled_input"
    scaled.outputs[0].shape, scaled.outputs[0].type = output.shape, output.type
    graph.insert_after(activation.node, scaled)
    for use in readers:
        use.node.replace_input_with(use.idx, scaled.outputs[0])
