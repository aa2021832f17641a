"""Rotate q and k, and v and the context, within each head: an exact change of basis that spreads outlier channels.

    q' = qU, k' = kU      q'k'ᵀ = qkᵀ for U orthogonal
    v' = vV               Pv' = (Pv)V, and proj takes it back: W_proj -> VᵀW_proj

U, V [d, d] random orthogonal, one pair for each head, by the plan's seed; q and k stay where rotary embedding comes
behind them. Exact in real arithmetic (METHOD, Rotation). The stage does not change, as with RotateStreams.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import RefusalError
from mptqc.graph.blocks import Projections, attention_projections
from mptqc.graph.edit import set_initializer
from mptqc.graph.layout import Shapes
from mptqc.graph.match import Linear, find_attentions
from mptqc.passes.base import Pass, PassResult, Stage

Matrices = NDArray[np.float64]


@dataclass(frozen=True)
class RotateHeads(Pass):
    """Rotate the heads of every attention whose q, k, v and context are read by it alone."""

    name: ClassVar[str] = "rotate-heads"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.CANONICAL,)
    seed: int
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Find all attentions that can be compensated, then rotate them."""
        found = []
        for attention in find_attentions(model):
            try:
                found.append(attention_projections(attention, model, self.shapes))
            except RefusalError:  # the same refusal is in the plan: these attentions cannot be folded either
                continue
        for position, projections in enumerate(found):
            _rotate(projections, np.random.default_rng((self.seed, position)))
        return PassResult(model, len(found))


def _rotate(projections: Projections, random: np.random.Generator) -> None:
    shape = (projections.heads, projections.head_size)
    scores, context = random_rotations(*shape, random), random_rotations(*shape, random)
    turned = [(projections.v, context), *((linear, scores) for linear in projections.scores or ())]
    for linear, matrices in turned:
        set_initializer(linear.matmul, 1, turn_columns(linear.weight, matrices))
        set_initializer(linear.add, linear.bias_index, turn_columns(linear.bias[None], matrices)[0])
    _turn_rows(projections.proj, context)


def random_rotations(count: int, size: int, random: np.random.Generator) -> Matrices:
    """Orthogonal matrices, uniformly distributed; [count, size, size] float64."""
    turned, triangle = np.linalg.qr(random.standard_normal((count, size, size)))
    result: Matrices = turned * np.sign(np.diagonal(triangle, axis1=1, axis2=2))[:, None, :]
    return result


def turn_columns(weight: NDArray[np.float32], matrices: Matrices) -> NDArray[np.float32]:
    """W [K, heads·d] with each head's columns multiplied by its matrix [heads, d, d]."""
    heads = weight.astype(np.float64).reshape(len(weight), len(matrices), -1)
    turned: NDArray[np.float32] = np.einsum("khd,hde->khe", heads, matrices).reshape(weight.shape).astype(np.float32)
    return turned


def _turn_rows(proj: Linear, matrices: Matrices) -> None:
    set_initializer(proj.matmul, 1, np.ascontiguousarray(turn_columns(proj.weight.T, matrices).T))
