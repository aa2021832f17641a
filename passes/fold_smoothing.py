"""SQ-b: divide each norm's affine by s, shift it by b; give the inverse to every Linear that reads it.

y = γ·n + β,  z = yW + B      =>      γ' = γ/s,  β' = (β − b)/s,  W' = diag(s)·W,  B' = B + bW

γ, β, s, b [C]; W [C, N]; B [N]. Exact in real arithmetic (METHOD, SQ-b). The stage keeps it from running twice.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import PlanError
from mptqc.graph.blocks import norm_readers
from mptqc.graph.edit import set_initializer
from mptqc.graph.layout import Shapes
from mptqc.graph.match import Linear, Norm, find_norms
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.plan import QuantPlan


@dataclass(frozen=True)
class FoldSmoothing(Pass):
    """Fold the plan's norm shifts and scales into the norms and their readers."""

    name: ClassVar[str] = "fold-smoothing"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.CANONICAL,)
    ensures: ClassVar[Stage | None] = Stage.NORMS_SMOOTHED
    plan: QuantPlan
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Fold every planned norm.

        Raises:
            PlanError: a planned norm is not in the model, or its arrays do not fit it.
            RefusalError: a reader of a planned norm cannot be compensated.
        """
        norms = {norm.site: norm for norm in find_norms(model)}
        missing = [fold.site for fold in self.plan.norm_folds if fold.site not in norms]
        if missing:
            raise PlanError(f"the plan smooths {', '.join(missing)}, which the model does not have")
        folded = [norms[fold.site] for fold in self.plan.norm_folds]
        found = [(norm, norm_readers(norm, model, self.shapes), *self._vectors(norm)) for norm in folded]
        for norm, linears, scale, shift in found:
            _fold(norm, linears, scale, shift)
        return PassResult(model, len(found))

    def _vectors(self, norm: Norm) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """s and b, [C]."""
        width = norm.gamma.shape
        scale = self.plan.scales(f"{norm.site}/scale", width)
        return scale.astype(np.float64), self.plan.array(f"{norm.site}/shift", width).astype(np.float64)


def _fold(norm: Norm, linears: list[Linear], scale: NDArray[np.float64], shift: NDArray[np.float64]) -> None:
    set_initializer(norm.node, 1, (norm.gamma / scale).astype(np.float32))
    set_initializer(norm.node, 2, ((norm.beta - shift) / scale).astype(np.float32))
    for linear in linears:
        weight = linear.weight.astype(np.float64)
        set_initializer(linear.add, linear.bias_index, (linear.bias + shift @ weight).astype(np.float32))
        set_initializer(linear.matmul, 1, (scale[:, None] * weight).astype(np.float32))
