"""Weights that make up for quantization, Linear by Linear: centred ridge, GPTQ, bias (METHOD, Compensation).

    ridge   (XcᵀXc + λ·mean(diag)·I) ΔW = XcᵀRc,  R = target − (X̂W + b), λ by held-out rows
    GPTQ    rows of W rounded one by one, the error of each spread over those to come by H = XcᵀXc, largest diagonal
            first
    bias    b' = mean(target) − mean(X̂)·Ŵ

X̂ [n, K]: the quantized input from the quantized path; target [n, N]: what the Linear should give.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mptqc.reference import trellis
from mptqc.reference.quantizers import quantize_weight
from mptqc.runtime.trellis import encode

Array = NDArray[np.float32]

STRENGTHS = (0.005, 0.02, 0.05, 0.2, 1.0, 5.0)
DAMPING = 0.02
BLOCK = 128
SMALLEST = 1e-12


@dataclass
class Moments:
    """Sums over rows as batches arrive: n, Σx [K], Σt [N], XᵀX [K, K], XᵀT [K, N]; float64.

    x and t are counted from an origin near their means, so that what varies little keeps its digits.
    """

    origin_x: Array
    origin_t: Array
    count: int
    x: NDArray[np.float64]
    t: NDArray[np.float64]
    xx: NDArray[np.float64]
    xt: NDArray[np.float64]

    @classmethod
    def around(cls, x: Array, target: Array) -> "Moments":
        """No rows yet; the origin is the mean of these rows x [n, K] and target [n, N]."""
        inputs, outputs = x.shape[1], target.shape[1]
        return cls(
            x.mean(axis=0, dtype=np.float64).astype(np.float32),
            target.mean(axis=0, dtype=np.float64).astype(np.float32),
            0,
            np.zeros(inputs),
            np.zeros(outputs),
            np.zeros((inputs, inputs)),
            np.zeros((inputs, outputs)),
        )

    def add(self, x: Array, target: Array) -> None:
        """Rows x [n, K] and target [n, N]."""
        x, target = x - self.origin_x, target - self.origin_t
        self.count += len(x)
        self.x += x.sum(axis=0, dtype=np.float64)
        self.t += target.sum(axis=0, dtype=np.float64)
        self.xx += x.T @ x
        self.xt += x.T @ target

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows, which have one origin."""
        return replace(
            self,
            count=self.count + other.count,
            x=self.x + other.x,
            t=self.t + other.t,
            xx=self.xx + other.xx,
            xt=self.xt + other.xt,
        )

    def empty(self) -> "Moments":
        """No rows, the same origin."""
        return replace(
            self,
            count=0,
            x=np.zeros_like(self.x),
            t=np.zeros_like(self.t),
            xx=np.zeros_like(self.xx),
            xt=np.zeros_like(self.xt),
        )

    def of_targets(self, columns: slice) -> "Moments":
        """Moments of some of the targets."""
        return replace(self, origin_t=self.origin_t[columns], t=self.t[columns], xt=self.xt[:, columns])

    @property
    def hessian(self) -> NDArray[np.float64]:
        """XcᵀXc/n, [K, K]."""
        return (self.xx - np.outer(self.x, self.x) / self.count) / self.count

    @property
    def cross(self) -> NDArray[np.float64]:
        """XcᵀTc/n, [K, N]."""
        return (self.xt - np.outer(self.x, self.t) / self.count) / self.count

    @property
    def mean_x(self) -> NDArray[np.float64]:
        """Mean of the rows x, [K]."""
        return self.origin_x + self.x / self.count

    @property
    def mean_t(self) -> NDArray[np.float64]:
        """Mean of the targets, [N]."""
        return self.origin_t + self.t / self.count


def ridge(fit: Moments, held_out: Moments, weight: Array) -> Array:
    """W + ΔW [K, N], ΔW solved on all rows, at the λ that does best on held-out rows when solved on the others.

    With few rows for many inputs a weak λ fits noise: then a strong one, or none at all (ΔW = 0), wins.
    """
    losses = [(_loss(held_out, _ridge(fit, weight, strength)), strength) for strength in STRENGTHS]
    best_loss, best = min(losses)
    if best_loss >= _loss(held_out, weight):
        return weight
    return _ridge(fit + held_out, weight, best)


def _ridge(moments: Moments, weight: Array, strength: float) -> Array:
    hessian = moments.hessian
    residual = moments.cross - hessian @ weight
    regular = hessian + np.eye(len(hessian)) * (strength * np.trace(hessian) / len(hessian) + SMALLEST)
    return (weight + np.linalg.solve(regular, residual)).astype(np.float32)


def _loss(moments: Moments, weight: Array) -> float:
    """E‖xcW − tc‖² less its part without W."""
    return float(np.sum(weight * (moments.hessian @ weight - 2 * moments.cross)))


@dataclass(frozen=True)
class Factor:
    """H factored for GPTQ: `order` [K], largest diagonal first; `upper` U [K, K], (H + damping)⁻¹ = UᵀU so ordered."""

    order: NDArray[np.int64]
    upper: Array

    @classmethod
    def of(cls, hessian: NDArray[np.float64]) -> "Factor":
        """Order, damp, invert and factor H [K, K]."""
        order = np.argsort(-np.diag(hessian), kind="stable")
        damping = DAMPING * np.trace(hessian) / len(hessian) + SMALLEST
        inverse = np.linalg.inv(hessian[np.ix_(order, order)] + np.eye(len(hessian)) * damping)
        return cls(order, np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32))

    @property
    def counts(self) -> Array:
        """What a row's squared error counts when the rows after it have made up for it: 1/U_kk² at `order`; [K]."""
        counts = np.empty(len(self.order), np.float32)
        counts[self.order] = 1 / np.square(np.diag(self.upper))
        return counts


def gptq(factor: Factor, weight: Array, scale: Array, bits: int, *, by_trellis: bool = False) -> NDArray[np.int8]:
    """Codes [K, N] of W at fixed scales [N], minimising tr((Ŵ − W)ᵀH(Ŵ − W)) greedily; int8.

    With `by_trellis` the codes of a row are chosen together, and mean what `reference.trellis.decode` says.
    """
    codes = np.empty(weight.shape, np.int8)
    importance = relative_importance(scale)

    def nearest(row: int, wanted: Array) -> Array:
        codes[row] = found = quantize_weight(wanted, scale, bits)
        return found * scale

    def nearest_by_trellis(row: int, wanted: Array) -> Array:
        codes[row] = found = encode((wanted / scale)[None], importance, bits)[0]
        return trellis.decode(found, bits) * scale

    _sweep(factor, weight, nearest_by_trellis if by_trellis else nearest)
    return codes


def rows_to_round(factor: Factor, weight: Array, scale: Array, bits: int) -> Array:
    """The rows of W as `gptq` meets them, changed by the errors of those before: [K, N]."""
    rows = np.empty_like(weight, np.float32)

    def nearest(row: int, wanted: Array) -> Array:
        rows[row] = wanted
        return quantize_weight(wanted, scale, bits) * scale

    _sweep(factor, weight, nearest)
    return rows


def _sweep(factor: Factor, weight: Array, rounded: Callable[[int, Array], Array]) -> None:
    """Round row after row: `rounded` is given a row's number and what it should be [N], and returns what it becomes."""
    order, upper = factor.order, factor.upper
    remaining = weight[order].astype(np.float32)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = np.empty((stop - start, weight.shape[1]), np.float32)
        for row in range(start, stop):
            error = (remaining[row] - rounded(int(order[row]), remaining[row])) / upper[row, row]
            remaining[row:stop] -= np.outer(upper[row, row:stop], error)
            errors[row - start] = error
        remaining[stop:] -= upper[start:stop, stop:].T @ errors


def relative_importance(scale: Array) -> Array:
    """What an error of one unit of each output's scale counts among all outputs; [N], 1 in the mean."""
    squared = np.square(scale, dtype=np.float64)
    relative: Array = (squared / squared.mean()).astype(np.float32)
    return relative


def refit_bias(moments: Moments, integers: NDArray[np.int8], scale: Array) -> Array:
    """The bias that makes the mean output right, [N]; integer weights [K, N]."""
    weight = integers.astype(np.float64) * scale
    return (moments.mean_t - moments.mean_x @ weight).astype(np.float32)
