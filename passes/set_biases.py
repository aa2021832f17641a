"""Give Linears the biases that compensation refitted.

    Linear(W, b)  =>  Linear(W, b'),  b' = plan array `<site>/bias` [N], for the sites that have one

Part of the quantized meaning of a Linear: it belongs right before QuantizeLinears. A second run changes nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.errors import PlanError
from mptqc.graph.edit import set_initializer
from mptqc.graph.match import find_linears
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.plan import QuantPlan


@dataclass(frozen=True)
class SetBiases(Pass):
    """Replace the bias of every planned Linear that has one in the plan."""

    name: ClassVar[str] = "set-biases"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.SMOOTHED,)
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Find the Linears whose bias differs from the plan's, then set them.

        Raises:
            PlanError: a bias in the plan has another length than the Linear's.
        """
        planned = {layer.site for layer in self.plan.layers}
        found = []
        for linear in find_linears(model):
            key = f"{linear.site}/bias"
            if linear.site not in planned or key not in self.plan.arrays:
                continue
            bias = self.plan.array(key)
            if bias.shape != linear.bias.shape:
                raise PlanError(f"{key} has shape {bias.shape}, the model's has {linear.bias.shape}")
            if not np.array_equal(bias, linear.bias):
                found.append((linear, bias))
        for linear, bias in found:
            set_initializer(linear.add, linear.bias_index, bias)
        return PassResult(model, len(found))
