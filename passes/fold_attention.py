"""Shifts and scales of q, k and v, folded through attention into the Linears around it.

k' = (k − b_k)·t,  q' = q/t      q'k'ᵀ = qkᵀ − q·b_k, and q·b_k is constant along the softmax axis: it cancels
v' = (v − b_v)/s                 Pv' = (Pv − b_v)/s, since softmax rows sum to 1; proj takes it back:
W_proj' = diag(s)·W_proj,  B_proj' = B_proj + b_v·W_proj

t, s, b_k, b_v [heads·head_size]; q and k stay where rotary embedding comes behind them. Exact in real arithmetic
(METHOD, SQ-b). The model is smoothed after it.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import PlanError
from mptqc.graph.blocks import Projections, attention_projections
from mptqc.graph.edit import remove_dead, set_initializer
from mptqc.graph.layout import Shapes
from mptqc.graph.match import Linear, find_attentions
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.plan import QuantPlan


@dataclass(frozen=True)
class FoldAttention(Pass):
    """Fold the plan's q, k and v shifts and scales."""

    name: ClassVar[str] = "fold-attention"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.NORMS_SMOOTHED,)
    ensures: ClassVar[Stage | None] = Stage.SMOOTHED
    plan: QuantPlan
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Fold every planned attention.

        Raises:
            PlanError: a planned attention is not in the model, or its arrays do not fit it.
            RefusalError: an operand of a planned attention has another reader.
        """
        attentions = {attention.site: attention for attention in find_attentions(model)}
        missing = [fold.site for fold in self.plan.attention_folds if fold.site not in attentions]
        if missing:
            raise PlanError(f"the plan folds {', '.join(missing)}, which the model does not have")
        found = [
            (fold.site, attention_projections(attentions[fold.site], model, self.shapes))
            for fold in self.plan.attention_folds
        ]
        folds = [(projections, self._vectors(site, projections)) for site, projections in found]
        for projections, vectors in folds:
            _fold(projections, vectors)
        if folds:
            remove_dead(model)
        return PassResult(model, len(folds))

    def _vectors(self, site: str, projections: Projections) -> "Vectors":
        width = (projections.heads * projections.head_size,)
        return Vectors(
            self.plan.array(f"{site}/k_shift", width).astype(np.float64),
            self.plan.array(f"{site}/v_shift", width).astype(np.float64),
            self.plan.scales(f"{site}/qk_scale", width).astype(np.float64),
            self.plan.scales(f"{site}/v_scale", width).astype(np.float64),
        )


@dataclass(frozen=True)
class Vectors:
    """b_k, b_v, t and s of one attention, [heads·head_size] each."""

    k_shift: NDArray[np.float64]
    v_shift: NDArray[np.float64]
    qk_scale: NDArray[np.float64]
    v_scale: NDArray[np.float64]


def _fold(projections: Projections, vectors: Vectors) -> None:
    if projections.scores is not None:
        q, k = projections.scores
        _transform_outputs(q, np.zeros_like(vectors.k_shift), 1.0 / vectors.qk_scale)
        _transform_outputs(k, vectors.k_shift, vectors.qk_scale)
    _transform_outputs(projections.v, vectors.v_shift, 1.0 / vectors.v_scale)
    proj = projections.proj
    weight = proj.weight.astype(np.float64)
    set_initializer(proj.add, proj.bias_index, (proj.bias + vectors.v_shift @ weight).astype(np.float32))
    set_initializer(proj.matmul, 1, (vectors.v_scale[:, None] * weight).astype(np.float32))


def _transform_outputs(linear: Linear, shift: NDArray[np.float64], scale: NDArray[np.float64]) -> None:
    """Make the Linear give (y − shift)·scale."""
    set_initializer(linear.add, linear.bias_index, ((linear.bias - shift) * scale).astype(np.float32))
    set_initializer(linear.matmul, 1, (linear.weight * scale).astype(np.float32))
