"""Activation quantizers worth trying, ranked by the error of single elements.

Uniform: lo and hi shrunk on a joint grid of half octaves. OPT-m: every way to divide the codes into two or more
regions that meet on their grids and fit 8 bits (METHOD, OPT-m), each at the same shrinks of hi. The choice among the
best few is by output error, in `ranges`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mptqc.graph.quantizer_nodes import CODES
from mptqc.plan import ActivationQuantizer, MultiRegion, Region, Uniform
from mptqc.reference.quantizers import fake_quantize

SHRINKS = tuple(2.0 ** (-step / 2) for step in range(13))
LARGEST_M, LARGEST_RATIO = 6, 3
"""The coarsest step is at most 2^6·Δ, and a region's at most 2^3 times that of the region below it."""

SHARES = 16
"""Regions hold whole numbers of 2^k/16 codes, the last one whatever is left."""

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

    def error(self, levels: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weighted mean squared error of rounding to the nearest of each row's rising levels [n, L]; [n]."""
        between = (levels[:, 1:] + levels[:, :-1]) / 2
        edges = np.searchsorted(self._sorted, between.reshape(-1)).reshape(between.shape)
        edges = np.pad(edges, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(self._sorted))))
        weight, first, second = (np.diff(sums[edges], axis=1) for sums in self._sums)
        total: NDArray[np.float64] = (second - 2 * levels * first + levels**2 * weight).sum(axis=1)
        mean: NDArray[np.float64] = np.maximum(total, 0) / self._sums[0][-1]
        return mean

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(self.values, kind="stable")

    @cached_property
    def _sorted(self) -> NDArray[np.float64]:
        return self.values[self._order].astype(np.float64)

    @cached_property
    def _sums(self) -> tuple[NDArray[np.float64], ...]:
        """Σw, Σwx, Σwx² up to each of the sorted values, 0 before the first."""
        weights, x = self.weights[self._order], self._sorted
        return tuple(np.concatenate([[0.0], np.cumsum(weights * x**power)]) for power in range(3))


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
        row = list(dict.fromkeys(uniform(bits, low, high) for low in _shrunk(points.low)))
        codes = np.arange(2**bits) - np.array([[one.zero_point] for one in row])
        errors = points.error(codes * np.array([[one.scale] for one in row]))
        best.append(Scored(float(errors.min()), row[int(errors.argmin())]))
    return sorted(best, key=lambda scored: scored.error)


def region_candidates(points: Points, bits: int, regions: int) -> list[Scored]:
    """For each choice of steps, and of where the lowest ends, the best quantizer; best first.

    Empty below 3 bits, and if nothing is above zero.

    Args:
        points: elements of the tensor.
        bits: 2..8.
        regions: the most that are tried, 2..4.
    """
    if points.high <= 0:
        return []
    best: dict[tuple[tuple[int, ...], int], Scored] = {}
    for m, divisions in divisions_of(bits, regions, below_zero=points.low < 0).items():
        codes = np.array([division.codes(m) for division in divisions], np.float64)
        scales = np.maximum(np.outer(_shrunk(points.high), 1 / codes[:, -1]), SMALLEST_SCALE).astype(np.float32)
        errors = np.stack([points.error(codes * scale[:, None].astype(np.float64)) for scale in scales])
        for at, (division, error) in enumerate(zip(divisions, errors.min(axis=0), strict=True)):
            key = m, division.split
            if key not in best or error < best[key].error:
                scale = float(scales[errors[:, at].argmin(), at])
                best[key] = Scored(float(error), division.quantizer(bits, m, scale))
    return sorted(best.values(), key=lambda scored: scored.error)


class Division(NamedTuple):
    """How many codes each region has, and which code of the lowest is zero."""

    zero_point: int
    counts: tuple[int, ...]

    @property
    def split(self) -> int:
        """Where the lowest region ends, in units of Δ."""
        return self.counts[0] - 1 - self.zero_point

    def codes(self, m: Sequence[int]) -> NDArray[np.int64]:
        """Every code, in units of Δ from zero."""
        steps = np.repeat([1, *(2**one for one in m)], self.counts)
        steps[0] = -self.zero_point
        return np.cumsum(steps)

    def quantizer(self, bits: int, m: Sequence[int], scale: float) -> MultiRegion:
        """As a quantizer, with steps 2^m·scale."""
        upper = tuple(Region(one, count) for one, count in zip(m, self.counts[1:], strict=True))
        return MultiRegion(bits=bits, scale=scale, zero_point=self.zero_point, low_codes=self.counts[0], upper=upper)


@lru_cache(maxsize=32)
def divisions_of(bits: int, regions: int, *, below_zero: bool) -> dict[tuple[int, ...], list[Division]]:
    """By the upper regions' m, rising: every division that meets on the grids, fits 8 bits and is `SHARES` apart."""
    found = {}
    for upper in range(1, regions if bits > 2 else 1):
        for m in combinations(range(1, LARGEST_M + 1), upper):
            if all(after - before <= LARGEST_RATIO for before, after in pairwise(m)):
                divisions = list(_divided(2**bits, m, below_zero))
                if divisions:
                    found[m] = divisions
    return found


def _divided(codes: int, m: tuple[int, ...], below_zero: bool) -> Iterator[Division]:
    unit = max(1, codes // SHARES)

    def upper(number: int, split: int, left: int) -> Iterator[tuple[tuple[int, ...], int]]:
        """Counts of the regions from `number` on, which begins at `split`, and the code that they reach."""
        step = 2 ** m[number]
        if split % step:
            return
        if number == len(m) - 1:
            yield (left,), split + left * step
            return
        for count in range(unit, left, unit):
            for counts, top in upper(number + 1, split + count * step, left - count):
                yield (count, *counts), top

    for zero_point in range(0, codes // 2 if below_zero else 1, unit):
        for split in range(0, codes - 1 - zero_point, max(unit, 2 ** m[0])):
            low_codes = split + 1 + zero_point
            for counts, top in upper(0, split, codes - low_codes):
                if zero_point + top < CODES:
                    yield Division(zero_point, (low_codes, *counts))


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
    else:
        near += _shifted(quantizer)
    return near


def _shifted(quantizer: MultiRegion) -> Iterator[MultiRegion]:
    """One code more below zero and one less at the top, and the reverse; the regions meet where they met."""
    last = quantizer.upper[-1]
    for step in (-1, 1):
        zero_point, top_codes = quantizer.zero_point + step, last.codes - step
        shifted = quantizer.model_copy(
            update={
                "zero_point": zero_point,
                "low_codes": quantizer.low_codes + step,
                "upper": (*quantizer.upper[:-1], last._replace(codes=top_codes)),
            }
        )
        if quantizer.zero_point and zero_point >= 0 and top_codes > 0 and shifted.top_code < CODES:
            yield shifted


def _shrunk(end: float) -> Sequence[float]:
    return [end * shrink for shrink in SHRINKS] if end else [0.0]
