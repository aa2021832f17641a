"""Weight scales: one per output channel, chosen by the error of the Linear's output; codes at these scales.

error_n = e_nᵀ H e_n,   e = Ŵ − W [K, N],   H = E[x xᵀ] [K, K]
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.gptq import relative_importance
from mptqc.analysis.observe import Rows
from mptqc.graph.match import find_linears
from mptqc.plan import QuantPlan
from mptqc.reference import trellis
from mptqc.reference.quantizers import quantize_weight, weight_limits
from mptqc.runtime.trellis import encode

Array = NDArray[np.float32]

SHRINKS = np.linspace(1.0, 0.4, 16)
SMALLEST_SCALE = 1e-12

STRETCHES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.7, 2.0, 2.4)
TRIED_ROWS = 32


def second_moment(rows: Rows) -> Array:
    """H = Σ w x xᵀ / Σ w over sampled rows; [K, K]."""
    weighted = rows.rows * np.sqrt(rows.weights / rows.weights.sum())[:, None]
    moment: Array = weighted.T @ weighted
    return moment


def largest_scale(weight: Array, bits: int) -> Array:
    """The scale per output channel at which no weight is clipped; W [K, N] -> [N]."""
    limit = weight_limits(bits)[1]
    scale: Array = np.maximum(np.abs(weight).max(axis=0) / np.float32(limit), np.float32(SMALLEST_SCALE))
    return scale


def search_weight_scale(weight: Array, bits: int, moment: Array | None) -> Array:
    """The best shrink of `largest_scale` for each output channel; [N].

    Args:
        weight: W [K, N].
        bits: 2..8.
        moment: H [K, K], or None to judge by the squared error of the weights themselves.
    """
    largest = largest_scale(weight, bits)
    best = np.full(weight.shape[1], np.inf)
    scale = largest
    for shrink in SHRINKS:
        candidate = (largest * np.float32(shrink)).astype(np.float32)
        error = quantize_weight(weight, candidate, bits) * candidate - weight
        projected = error if moment is None else moment @ error
        loss = np.einsum("kn,kn->n", error, projected)
        scale = np.where(loss < best, candidate, scale)
        best = np.minimum(loss, best)
    return scale.astype(np.float32)


def search_trellis_scale(rows: Array, counts: Array, bits: int) -> Array:
    """The best of STRETCHES of each output channel's deviation, for weights that a trellis codes; [N].

    The rows that count most are judged by their codes, the others by what lies beyond the largest weight.

    Args:
        rows: what is to be coded, [K, N]: W, or what GPTQ makes of it (`rows_to_round`).
        counts: what each row's squared error counts, [K].
        bits: a key of `trellis.TAPS`.
    """
    tried, others = np.split(np.argsort(-counts, kind="stable"), [TRIED_ROWS])
    share = counts / max(counts.sum(), SMALLEST_SCALE)
    deviation = np.sqrt(share @ np.square(rows, dtype=np.float64)) / trellis.deviation(bits)
    best = np.full(rows.shape[1], np.inf)
    scale = np.empty(rows.shape[1], np.float32)
    for stretch in STRETCHES:
        candidate = np.maximum(deviation * stretch, SMALLEST_SCALE).astype(np.float32)
        error = trellis.decode(trellis_codes(rows[tried], candidate, bits), bits) * candidate - rows[tried]
        beyond = np.maximum(np.abs(rows[others]) - trellis.LARGEST * candidate, 0)
        loss = share[tried] @ error**2 / max(share[tried].sum(), SMALLEST_SCALE) + share[others] @ beyond**2
        scale = np.where(loss < best, candidate, scale)
        best = np.minimum(loss, best)
    return scale


def trellis_codes(weight: Array, scale: Array, bits: int) -> NDArray[np.int8]:
    """The codes [K, N] of W [K, N] whose weights are nearest to it at these scales [N], row by row; int8."""
    return encode(weight / scale, relative_importance(scale), bits)


def with_trellis_codes(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    """The plan with the codes of every weight that a trellis codes; those that it has already stay."""
    missing = {
        layer.site: layer for layer in plan.layers if layer.trellis and f"{layer.site}/weight_codes" not in plan.arrays
    }
    found: dict[str, NDArray[np.generic]] = {}
    for linear in find_linears(model) if missing else ():
        if (layer := missing.get(linear.site)) is not None:
            scale = plan.scales(f"{layer.site}/weight_scale", linear.weight.shape[1:])
            found[f"{layer.site}/weight_codes"] = trellis_codes(linear.weight, scale, layer.weight_bits)
    return plan.with_arrays(found)
