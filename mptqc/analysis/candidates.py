"""Activation quantizers worth trying, ranked by the error of single elements.

Uniform: lo and hi shrunk on a joint grid of half octaves. OPT-m: (m, n1, Δ, z) together; T/Δ = n1 − 1 − z is a multiple
of 2^m and the codes fit 8 bits (METHOD, OPT-m). The choice among the best few is by output error, in `ranges`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mptqc.plan import ActivationQuantizer, TwoRegion, Uniform
from mptqc.reference.quantizers import fake_quantize

SHRINKS = tuple(2.0 ** (-step / 2) for step in range(13))
LOW_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
RANDOM_POINTS = 8192
EXTREME_POINTS = 256
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class Points:
    """Weighted elements of one tensor: `values` and `weights` [n]; `low`, `high` over all the data."""

    values: NDArray[np.float32]
    weights: NDArray[np.float64]
    low: float
    high: float


@dataclass(frozen=True)
class Scored:
    """A quantizer and its error."""

    error: float
    quantizer: ActivationQuantizer


def points_of(
    values: NDArray[np.float32], weights: NDArray[np.float32] | None, low: float, high: float, seed: int
) -> Points:
    """Random elements, weighted, and the ones farthest out, each with weight 1.

    Args:
        values: [n, ...]; weights: [n], how many of the data each row stands for, or what it counts; None for 1.
        low: the smallest value over all the data, high: the largest; both are widened to hold 0.
        seed: of the choice of elements.
    """
    flat = values.reshape(-1)
    spread = np.ones(len(flat)) if weights is None else np.repeat(weights.astype(np.float64), flat.size // len(weights))
    count = min(RANDOM_POINTS, flat.size)
    chosen = np.random.default_rng(seed).choice(flat.size, count, replace=False)
    extreme = np.argpartition(np.abs(flat), -min(EXTREME_POINTS, flat.size))[-min(EXTREME_POINTS, flat.size) :]
    return Points(
        np.concatenate([flat[chosen], flat[extreme]]),
        np.concatenate([spread[chosen] * (flat.size / count), np.ones(len(extreme))]),
        min(low, 0.0),
        max(high, 0.0),
    )


def uniform(bits: int, low: float, high: float) -> Uniform:
    """The uniform quantizer whose codes span [low, high], zero exact; low ≤ 0 ≤ high."""
    levels = 2**bits - 1
    scale = float(np.float32(max((high - low) / levels, SMALLEST_SCALE)))
    return Uniform(bits=bits, scale=scale, zero_point=int(np.clip(round(-low / scale), 0, levels)))


def element_error(quantizer: ActivationQuantizer, points: Points) -> float:
    """Weighted mean squared error of single elements."""
    error = (fake_quantize(quantizer, points.values) - points.values).astype(np.float64)
    return float(points.weights @ (error * error) / points.weights.sum())


def uniform_candidates(points: Points, bits: int) -> list[Scored]:
    """For each upper end on the grid the best lower end, best first."""
    best = []
    for high in _shrunk(points.high):
        row = [uniform(bits, low, high) for low in _shrunk(points.low)]
        best.append(_score(row, points)[0])
    return sorted(best, key=lambda scored: scored.error)


def two_region_candidates(points: Points, bits: int) -> list[Scored]:
    """For each (m, share of low codes) the best scale and zero point, best first; empty below 3 bits."""
    best = []
    for m in range(1, largest_m(bits) + 1):
        for share in LOW_SHARES:
            row = [two for top in _shrunk(points.high) for two in _two_regions(points.low, bits, m, share, top)]
            if row:
                best.append(_score(row, points)[0])
    return sorted(best, key=lambda scored: scored.error)


def neighbours(quantizer: ActivationQuantizer) -> list[ActivationQuantizer]:
    """The same structure at nearby scales and zero points."""
    near: list[ActivationQuantizer] = [
        quantizer.model_copy(update={"scale": float(np.float32(quantizer.scale * factor))})
        for factor in (0.85, 0.92, 0.96, 1.04, 1.09, 1.18)
    ]
    if isinstance(quantizer, Uniform):
        for step in (-1, 1):
            zero_point = quantizer.zero_point + step
            if 0 <= zero_point < 2**quantizer.bits and quantizer.zero_point:
                near.append(quantizer.model_copy(update={"zero_point": zero_point}))
    return near


def largest_m(bits: int) -> int:
    """The largest m at which an even split still fits 8 bits: (2^(k−1) − 1)·2^m ≤ 255 (METHOD, OPT-m)."""
    m = 0
    while bits > 2 and (2 ** (bits - 1) - 1) * 2 ** (m + 1) <= 255 and m < 5:
        m += 1
    return m


def _shrunk(end: float) -> Sequence[float]:
    return [end * shrink for shrink in SHRINKS] if end else [0.0]


def _score(quantizers: Iterable[ActivationQuantizer], points: Points) -> list[Scored]:
    scored = [Scored(element_error(quantizer, points), quantizer) for quantizer in dict.fromkeys(quantizers)]
    return sorted(scored, key=lambda one: one.error)


def _two_regions(low: float, bits: int, m: int, share: float, top: float) -> list[TwoRegion]:
    """Quantizers of this structure whose largest value is near `top`; z covers `low` as far as codes allow."""
    if top <= 0:
        return []
    coarse, codes = 2**m, 2**bits
    found = []
    low_codes = max(1, round(codes * share))
    zero_point = 0
    for _ in range(3):  # z and Δ depend on each other; three rounds settle
        reach = max(low_codes - 1 - zero_point, 0) + (codes - low_codes) * coarse
        scale = max(top / reach, SMALLEST_SCALE)
        zero_point = min(int(np.ceil(-low / scale - 0.5)), low_codes - 1) if low < 0 else 0
    for zero in {max(zero_point - 1, 0), zero_point, min(zero_point + 1, low_codes - 1)} if low < 0 else {0}:
        split = round(max(low_codes - 1 - zero, 0) / coarse) * coarse
        fitted = split + 1 + zero
        if not 1 <= fitted < codes or fitted - 1 + (codes - fitted) * coarse > 255:
            continue
        scale = float(np.float32(max(top / (split + (codes - fitted) * coarse), SMALLEST_SCALE)))
        found.append(TwoRegion(bits=bits, scale=scale, zero_point=zero, m=m, low_codes=fitted))
    return found
