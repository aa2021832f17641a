"""Weight scales: one per output channel, chosen by the error of the Linear's output.

error_n = e_nᵀ H e_n,   e = Ŵ − W [K, N],   H = E[x xᵀ] [K, K]
"""

import numpy as np
from numpy.typing import NDArray

from mptqc.analysis.observe import Rows
from mptqc.reference.quantizers import quantize_weight, weight_limits

Array = NDArray[np.float32]

SHRINKS = np.linspace(1.0, 0.4, 16)
SMALLEST_SCALE = 1e-12


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
