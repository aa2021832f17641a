"""Activation quantizers, chosen by the error that they cause where the tensor is used (METHOD, Recipe).

Linear       ‖(Q(x) − x)W‖²
q, k         ‖(Q(q) − q)kᵀ‖², ‖q(Q(k) − k)ᵀ‖², each row's mean removed (softmax does not see it)
softmax, v   ‖(Q(P) − P)V‖², ‖P(Q(v) − v)‖², with r·E for P where rows are scaled: then E is what is quantized
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mptqc.analysis.candidates import (
    Points,
    Scored,
    element_error,
    neighbours,
    points_of,
    region_candidates,
    uniform,
    uniform_candidates,
)
from mptqc.analysis.observe import Rows, Slices
from mptqc.plan import ActivationQuantizer, MultiRegion
from mptqc.recipe import RangeMethod
from mptqc.reference.quantizers import fake_quantize

Array = NDArray[np.float32]
OutputError = Callable[[ActivationQuantizer], float]
Search = Callable[[int], ActivationQuantizer]
"""From bits, 2..8, to the best quantizer of one tensor; what all widths share is prepared."""

WORTH = 1.1
"""A region more costs time in every run: it must divide the error by so much."""

SHORTLIST = 6
REGION_SHORTLIST = 16
PROBABILITY_SHORTLIST, FEW_BITS = 48, 4
"""Of probabilities the best by elements is often not the best by far: at few bits more are tried."""

PERCENTILE = 99.99
REFINEMENTS = 2


def search_quantizer(
    points: Points,
    bits: int,
    method: RangeMethod,
    *,
    regions: int,
    output_error: OutputError,
    shortlist: int = REGION_SHORTLIST,
) -> ActivationQuantizer:
    """The best quantizer of one tensor.

    Args:
        points: weighted elements of the tensor.
        bits: 2..8.
        method: how to choose; OPT-m is always searched, by element error where `method` is not `output`.
        regions: the most regions of OPT-m, tried beside uniform; 1 for uniform only.
        output_error: error where the tensor is used, for `output`.
        shortlist: how many quantizers of OPT-m are tried there.
    """
    if method is RangeMethod.MIN_MAX:
        plain = [Scored(0.0, uniform(bits, points.low, points.high))]
    elif method is RangeMethod.PERCENTILE:
        plain = [Scored(0.0, uniform(bits, *_percentile_range(points)))]
    else:
        plain = uniform_candidates(points, bits)
    split = region_candidates(points, bits, regions) if regions > 1 else []
    if method is RangeMethod.OUTPUT:
        full_range = Scored(0.0, uniform(bits, points.low, points.high))
        return _search_by_output([full_range, *plain[:SHORTLIST], *split[:shortlist]], output_error)
    if not split:
        return plain[0].quantizer
    return min(plain[0].quantizer, split[0].quantizer, key=lambda one: element_error(one, points))


def _search_by_output(shortlist: Sequence[Scored], output_error: OutputError) -> ActivationQuantizer:
    """The best of the shortlist, then of its neighbours while that helps; a region more must be worth it."""
    scored = [_judged(one.quantizer, output_error) for one in shortlist]
    best = min(scored, key=lambda one: one.error)
    for _ in range(REFINEMENTS):
        near = [_judged(quantizer, output_error) for quantizer in neighbours(best.quantizer)]
        nearest = min(near, key=lambda one: one.error)
        if nearest.error >= best.error:
            break
        best = nearest
    return best.quantizer


def _judged(quantizer: ActivationQuantizer, output_error: OutputError) -> Scored:
    upper = len(quantizer.upper) if isinstance(quantizer, MultiRegion) else 0
    return Scored(output_error(quantizer) * WORTH**upper, quantizer)


def _percentile_range(points: Points) -> tuple[float, float]:
    order = np.argsort(points.values)
    cumulated = np.cumsum(points.weights[order])
    shares = cumulated / cumulated[-1] * 100
    low = float(points.values[order[int(np.searchsorted(shares, 100 - PERCENTILE))]])
    high = float(points.values[order[min(int(np.searchsorted(shares, PERCENTILE)), len(order) - 1)]])
    return min(low, 0.0), max(high, 0.0)


def linear_input_search(
    rows: Rows, weights: Sequence[Array], method: RangeMethod, *, regions: int, seed: int, corrected: bool = False
) -> Search:
    """The search for the input quantizer of the Linears that read one value.

    Args:
        rows: samples of the value, [n, K].
        weights: W [K, N] of each reader.
        method: how to choose.
        regions: as for `search_quantizer`.
        seed: of the choice of elements.
        corrected: whether weights and biases will be compensated: then only what they cannot mend counts.
    """
    points = points_of(rows.rows, rows.weights, float(rows.low.min()), float(rows.high.max()), seed)
    factor = output_factor(weights)
    root = np.sqrt(rows.weights)[:, None]

    def output_error(quantizer: ActivationQuantizer) -> float:
        found = fake_quantize(quantizer, rows.rows)
        error = found - rows.rows
        if corrected:
            error = uncorrected(error, found, rows.weights)
        return float(np.square((error * root) @ factor).sum())

    return lambda bits: search_quantizer(points, bits, method, regions=regions, output_error=output_error)


def uncorrected(error: Array, found: Array, weights: Array) -> Array:
    """What is left of an error e [n, K] once each channel is mended by the affine map of x̂ that does it best; [n, K].

    Compensation does that and more: a mean error goes into the bias, a share of x̂ into the weight's row.

    Args:
        error: e = x̂ − x.
        found: x̂, [n, K].
        weights: what each row counts, [n].
    """
    share = weights / weights.sum()
    centred = found - share @ found
    left = error - share @ error
    variance = share @ np.square(centred)
    slope = np.divide(share @ (centred * left), variance, out=np.zeros_like(variance), where=variance > 0)
    mended: Array = left - slope * centred
    return mended


def _left_of_head(error: Array, context: Array) -> float:
    """The error of one head's context [slices, T, d] that no affine map of its channels mends."""
    error, found = (values.reshape(-1, values.shape[-1]) for values in (error, context + error))
    return float(np.square(uncorrected(error, found, np.ones(len(error), np.float32))).sum())


def output_factor(weights: Sequence[Array]) -> Array:
    """F [K, ≤K] with ‖eF‖ = ‖eW‖ for the joined W of all readers, in the fewest columns."""
    joined = np.concatenate(weights, axis=1)
    if joined.shape[1] <= joined.shape[0]:
        return joined
    factor: Array = np.asarray(np.linalg.qr(joined.T, mode="r")).T  # W = (QR)ᵀ, and Q keeps lengths
    return factor


def attention_searches(
    slices: Slices, method: RangeMethod, *, regions: int, seed: int, corrected: bool = False
) -> Mapping[str, Search]:
    """The searches for q, k, p and v of one attention; OPT-m is tried for the probabilities (p) only.

    Args:
        slices: operands of the products.
        method: how to choose.
        regions: as for `search_quantizer`.
        seed: of the choice of elements.
        corrected: whether the Linear that reads the context will be compensated: then only what it cannot mend counts.
    """
    q, k, p, v = slices.q, slices.k, slices.p, slices.v
    row_scale = 1 / p.sum(axis=-1, keepdims=True)  # 1, or r where p is E: probabilities sum to 1
    context, heads = np.matmul(p, v) * row_scale, np.unique(slices.heads)
    k_centred = k - k.mean(axis=1, keepdims=True)
    k_moment = np.matmul(k_centred.transpose(0, 2, 1), k_centred)
    q_moment = np.matmul(q.transpose(0, 2, 1), q)

    def q_error(quantizer: ActivationQuantizer) -> float:
        error = fake_quantize(quantizer, q) - q
        return float(np.sum(np.matmul(error, k_moment) * error))

    def k_error(quantizer: ActivationQuantizer) -> float:
        error = fake_quantize(quantizer, k) - k
        error -= error.mean(axis=1, keepdims=True)
        return float(np.sum(np.matmul(error, q_moment) * error))

    def p_error(quantizer: ActivationQuantizer) -> float:
        return context_error(np.matmul(fake_quantize(quantizer, p) - p, v) * row_scale)

    def v_error(quantizer: ActivationQuantizer) -> float:
        return context_error(np.matmul(p, fake_quantize(quantizer, v) - v) * row_scale)

    def context_error(error: Array) -> float:
        if not corrected:
            return float(np.square(error).sum())
        return sum(_left_of_head(error[slices.heads == head], context[slices.heads == head]) for head in heads)

    def search(values: Array, error: OutputError, allowed: int) -> Search:
        points = points_of(values, None, float(values.min()), float(values.max()), seed)
        return lambda bits: search_quantizer(
            points,
            bits,
            method,
            regions=allowed,
            output_error=error,
            shortlist=PROBABILITY_SHORTLIST if bits <= FEW_BITS else REGION_SHORTLIST,
        )

    return {
        "q": search(q, q_error, 1),
        "k": search(k, k_error, 1),
        "p": search(p, p_error, regions),
        "v": search(v, v_error, 1),
    }
