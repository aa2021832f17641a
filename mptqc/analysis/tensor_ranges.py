"""Quantizers of the tensors that full coverage adds, chosen by the error that they cause where the tensor is read.

Norm input       ‖(LN(Q(x)) − LN(x))W‖², W of the Linears that read the norm; per-channel powers of two compete
GELU input       ‖(GELU(Q(x)) − GELU(x))W‖², W of the Linears that read the GELU
Scores           ‖(softmax(Q(s)) − softmax(s))V‖²
All others       Σ_t ‖Q(x_t) − x_t‖²/var(x_t): tokens with massive activations do not decide alone
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mptqc.analysis.candidates import points_of
from mptqc.analysis.observe import Rows, Slices
from mptqc.analysis.ranges import output_factor, search_quantizer
from mptqc.plan import ActivationQuantizer
from mptqc.recipe import RangeMethod
from mptqc.reference.custom_ops import gelu
from mptqc.reference.quantizers import dequantize, fake_quantize, quantize

Array = NDArray[np.float32]

EXPONENT_TARGETS = (1.0, 4.0)
"""Channels that reach further than so many times the median channel are brought within that."""
MOST_EXPONENT = 7
MASKED = 16.0
"""Scores farther than this below the largest of their row count as masked: softmax gives them 1e-7 at most."""
GELU_ZERO = -4.0
"""GELU of what lies below is 0 to −1.3e-4."""
EPSILON = 1e-6
CODES = 256


@dataclass(frozen=True)
class NormReader:
    """A norm that reads the tensor: γ [C], and W [C, N] of each Linear that reads the norm."""

    gamma: Array
    weights: Sequence[Array]


class NormInputSearch:
    """The search for the quantizers of what norms read, x̂ = 2^e·Q(x/2^e), by the error at the readers.

    Args:
        rows: samples of the tensor, [n, C].
        readers: the norms.
        method: how quantizers are chosen; exponents are chosen by the error at the readers in any case.
        seed: of the choice of elements.
    """

    def __init__(self, rows: Rows, readers: Sequence[NormReader], method: RangeMethod, seed: int) -> None:
        self._rows = rows
        self._method = method
        self._seed = seed
        self._error_of = _norm_error(rows, readers)

    def best_exponents(self, bits: int) -> NDArray[np.int8] | None:
        """The exponents e [C] that do best at so many bits; None if none do."""
        trials = [None, *_exponents(self._rows)]
        errors = [self._error_of(self._fake_quantize(self.quantizer(bits, each), each)) for each in trials]
        return trials[int(np.argmin(errors))]

    def quantizer(self, bits: int, exponents: NDArray[np.int8] | None) -> ActivationQuantizer:
        """The best quantizer of x/2^e."""
        rows = self._rows
        factor = _factor(exponents, rows.rows.shape[1])
        x: Array = rows.rows / factor
        weights: Array = _per_variance(rows)[:, None] * np.square(factor)
        low, high = float((rows.low / factor).min()), float((rows.high / factor).max())
        points = points_of(x.reshape(-1), weights.reshape(-1), low, high, self._seed)

        def output_error(quantizer: ActivationQuantizer) -> float:
            return self._error_of(fake_quantize(quantizer, x) * factor)

        return search_quantizer(points, bits, self._method, regions=1, output_error=output_error)

    def _fake_quantize(self, quantizer: ActivationQuantizer, exponents: NDArray[np.int8] | None) -> Array:
        factor = _factor(exponents, self._rows.rows.shape[1])
        found: Array = fake_quantize(quantizer, self._rows.rows / factor) * factor
        return found


def _norm_error(rows: Rows, readers: Sequence[NormReader]) -> Callable[[Array], float]:
    """The error at the readers that a value x̂ in the place of the rows causes."""
    factors = [_reader_factor(reader) for reader in readers]
    normed = _normalised(rows.rows)
    root = np.sqrt(rows.weights)[:, None]

    def error_of(found: Array) -> float:
        error = (_normalised(found) - normed) * root
        return sum(float(np.square(error @ factor).sum()) for factor in factors)

    return error_of


def _factor(exponents: NDArray[np.int8] | None, channels: int) -> Array:
    """2^e, [C]."""
    factor: Array = np.exp2(np.zeros(channels, np.float32) if exponents is None else exponents.astype(np.float32))
    return factor


def search_gelu_input(
    rows: Rows, weights: Sequence[Array], bits: int, method: RangeMethod, *, seed: int
) -> ActivationQuantizer:
    """The quantizer of what a GELU reads; its range ends where GELU is next to 0.

    Args:
        rows: samples of the tensor, [n, C].
        weights: W [C, N] of the Linears that read the GELU.
        bits: 2..8.
        method: how to choose.
        seed: of the choice of elements.
    """
    low = max(float(rows.low.min()), GELU_ZERO)
    points = points_of(np.maximum(rows.rows, np.float32(GELU_ZERO)), rows.weights, low, float(rows.high.max()), seed)
    factor = output_factor(weights) if weights else np.eye(rows.rows.shape[1], dtype=np.float32)
    after = gelu(rows.rows)
    root = np.sqrt(rows.weights)[:, None]

    def output_error(quantizer: ActivationQuantizer) -> float:
        table = gelu(dequantize(quantizer, np.arange(CODES, dtype=np.int32)))
        error = (table[quantize(quantizer, rows.rows)] - after) * root
        return float(np.square(error @ factor).sum())

    return search_quantizer(points, bits, method, regions=1, output_error=output_error)


def search_scores(slices: Slices, bits: int, method: RangeMethod, *, seed: int) -> ActivationQuantizer:
    """The quantizer of what a softmax reads; its range is that of the scores that are not masked."""
    assert slices.scores is not None, "observed with scores"
    scores, v = slices.scores, slices.v
    kept = np.maximum(scores, scores.max(axis=-1, keepdims=True) - np.float32(MASKED))
    points = points_of(kept, None, float(kept.min()), float(kept.max()), seed)

    def output_error(quantizer: ActivationQuantizer) -> float:
        error = _softmax(fake_quantize(quantizer, scores)) - slices.p
        return float(np.square(np.matmul(error, v)).sum())

    return search_quantizer(points, bits, method, regions=1, output_error=output_error)


def search_rows(rows: Rows, bits: int, method: RangeMethod, *, seed: int) -> ActivationQuantizer:
    """The quantizer of a tensor by its own error, each token relative to its variance."""
    weights = _per_variance(rows)
    points = points_of(rows.rows, weights, float(rows.low.min()), float(rows.high.max()), seed)

    def output_error(quantizer: ActivationQuantizer) -> float:
        error = fake_quantize(quantizer, rows.rows) - rows.rows
        return float(weights @ np.square(error).sum(axis=1))

    return search_quantizer(points, bits, method, regions=1, output_error=output_error)


def _reader_factor(reader: NormReader) -> Array:
    """F [C, ≤C]: an error e of the normalised rows counts as ‖eF‖."""
    if not reader.weights:
        diagonal: Array = np.diag(reader.gamma)
        return diagonal
    factor: Array = reader.gamma[:, None] * output_factor(reader.weights)
    return factor


def _exponents(rows: Rows) -> Iterator[NDArray[np.int8]]:
    """For each target the exponents that bring every channel's reach within it, if any are needed; the least is 0."""
    reach = np.maximum(np.abs(rows.low), np.abs(rows.high)).astype(np.float64)
    median = np.median(reach)
    for target in EXPONENT_TARGETS:
        wanted = np.ceil(np.log2(np.maximum(reach, 1e-30) / max(target * median, 1e-30)))
        found = np.clip(wanted, 0, MOST_EXPONENT).astype(np.int8)
        if found.any():
            yield found


def _per_variance(rows: Rows) -> Array:
    """What each row counts: how many rows of the data it stands for, over its variance."""
    variance = rows.rows.var(axis=1) + np.float32(EPSILON)
    weights: Array = rows.weights / variance
    return weights


def _normalised(rows: Array) -> Array:
    centred = rows - rows.mean(axis=1, keepdims=True)
    normed: Array = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(EPSILON))
    return normed


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares
