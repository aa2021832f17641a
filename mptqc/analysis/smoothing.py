"""SQ-b and the folds through attention: which shifts and scales make the quantized layer's output best.

Norm:  b = (hi + lo)/2,  r = (hi − lo)/2,  s = r^α / max|W|^(1−α) per channel; α by the error of the readers' output
       with quantized weights and activations; "no smoothing" competes too (METHOD, SQ-b). So do the
       mean for b and s = σ^a: a few massive tokens decide lo and hi, but not where the rest lies.
K, V:  b likewise;  t = (r_q/r_k)^(a/2);  s_v = r_v^α / max|W_proj|^(1−α). The mean and deviation of the context compete
       for V: as P's rows sum to 1, V and context lose the same b.
GELU:  s = r^a per channel of its output, r the largest magnitude; "no scale" competes too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mptqc.analysis.candidates import points_of, region_candidates, uniform_candidates
from mptqc.analysis.observe import Rows, Slices
from mptqc.analysis.ranges import uncorrected
from mptqc.analysis.weights import search_weight_scale
from mptqc.plan import ActivationQuantizer
from mptqc.reference.quantizers import fake_quantize, quantize_weight

Array = NDArray[np.float32]

SMALLEST = 1e-6
LARGEST_RATIO = 1e4
EXPONENTS = (0.0, 0.5, 1.0)
POWERS = (0.3, 0.6)
GELU_EXPONENTS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Smoothing:
    """x' = (x − shift)/scale, [C] each; no `alpha`, with scale 1 and shift 0, means: left alone."""

    alpha: float | None
    shift: Array
    scale: Array


def plan_norm(
    rows: Rows,
    weights: Sequence[Array],
    weight_bits: int,
    activation_bits: int,
    alphas: Sequence[float],
    seed: int,
    *,
    corrected: bool = False,
) -> Smoothing:
    """The smoothing of one norm's output.

    Args:
        rows: samples of the norm's output, [n, C].
        weights: W [C, N] of each reader.
        weight_bits: of the readers; activation_bits: of their common input.
        alphas: migration strengths to try.
        seed: of the choice of elements.
        corrected: whether biases will be compensated: then mean errors do not count.
    """
    weight = np.concatenate(weights, axis=1)
    channels = weight.shape[0]
    trials = [Smoothing(None, np.zeros(channels, np.float32), np.ones(channels, np.float32))]
    (middle, half_range), (mean, deviation) = centres(rows)
    trials += [Smoothing(alpha, middle, migration_scale(half_range, weight, alpha)) for alpha in alphas]
    trials += [Smoothing(power, mean, power_scale(deviation, power)) for power in POWERS if alphas]
    errors = [
        _trial_error(rows, weight, trial, weight_bits, activation_bits, seed, corrected=corrected) for trial in trials
    ]
    return trials[int(np.argmin(errors))]


def migration_scale(reach: Array, weight: Array, alpha: float) -> Array:
    """s = r^α / max|W|^(1−α) per input channel, its geometric mean brought to 1 and its spread bounded; [C]."""
    largest = np.maximum(np.abs(weight).max(axis=1), SMALLEST)
    return _bounded(alpha * np.log(reach) - (1 - alpha) * np.log(largest))


def power_scale(reach: Array, power: float) -> Array:
    """s = r^a, whatever the weights are, bounded likewise; [C]."""
    return _bounded(power * np.log(reach))


def _bounded(logarithm: NDArray[np.floating]) -> Array:
    logarithm = logarithm - logarithm.mean()
    scale: Array = np.exp(np.clip(logarithm, -np.log(LARGEST_RATIO), np.log(LARGEST_RATIO))).astype(np.float32)
    return scale


def centres(rows: Rows) -> list[tuple[Array, Array]]:
    """Where each channel lies and how far it reaches, two ways, [C] each: by its range, by mean and deviation."""
    share = rows.weights / rows.weights.sum()
    mean: Array = (share @ rows.rows).astype(np.float32)
    deviation: Array = np.sqrt(share @ np.square(rows.rows - mean)).astype(np.float32)
    middle: Array = ((rows.high + rows.low) / 2).astype(np.float32)
    half_range: Array = ((rows.high - rows.low) / 2).astype(np.float32)
    return [(middle, np.maximum(half_range, SMALLEST)), (mean, np.maximum(deviation, SMALLEST))]


def _trial_error(
    rows: Rows,
    weight: Array,
    trial: Smoothing,
    weight_bits: int,
    activation_bits: int,
    seed: int,
    *,
    regions: int = 1,
    corrected: bool = False,
) -> float:
    """‖Q(x')Q(W') − x'W'‖² over sampled rows."""
    smoothed = (rows.rows - trial.shift) / trial.scale
    scaled = trial.scale[:, None] * weight
    low, high = (rows.low - trial.shift) / trial.scale, (rows.high - trial.shift) / trial.scale
    points = points_of(smoothed, rows.weights, float(low.min()), float(high.max()), seed)
    candidates = uniform_candidates(points, activation_bits)
    if regions > 1:
        candidates += region_candidates(points, activation_bits, regions)
    quantizer = min(candidates, key=lambda scored: scored.error).quantizer
    weight_scale = search_weight_scale(scaled, weight_bits, None)
    codes = quantize_weight(scaled, weight_scale, weight_bits) * weight_scale
    error = fake_quantize(quantizer, smoothed) @ codes - smoothed @ scaled
    if corrected:
        error -= rows.weights @ error / rows.weights.sum()
    return float(rows.weights @ np.square(error).sum(axis=1))


def plan_gelu(
    rows: Rows,
    weights: Sequence[Array],
    weight_bits: int,
    activation_bits: int,
    seed: int,
    *,
    regions: int,
    corrected: bool = False,
) -> Smoothing:
    """The scale of one GELU's output; its shift is 0: exact zeros stay zeros.

    Args:
        rows: samples of the GELU's output, [n, K].
        weights: W [K, N] of each reader.
        weight_bits: of the readers; activation_bits: of their common input.
        seed: of the choice of elements.
        regions: the most that the quantizer of that input may have.
        corrected: as for `plan_norm`.
    """
    weight = np.concatenate(weights, axis=1)
    reach = np.maximum(np.maximum(np.abs(rows.low), np.abs(rows.high)), SMALLEST)
    no_shift = np.zeros_like(reach)
    trials = [Smoothing(None, no_shift, np.ones_like(reach))]
    for exponent in GELU_EXPONENTS:
        logarithm = exponent * np.log(reach)
        trials.append(Smoothing(exponent, no_shift, np.exp(logarithm - logarithm.mean()).astype(np.float32)))
    errors = [
        _trial_error(rows, weight, trial, weight_bits, activation_bits, seed, regions=regions, corrected=corrected)
        for trial in trials
    ]
    return trials[int(np.argmin(errors))]


def plan_attention(
    q: Rows | None,
    k: Rows | None,
    v: Rows,
    proj_input: Rows,
    proj_weight: Array,
    slices: Slices,
    bits: int,
    alphas: Sequence[float],
    *,
    corrected: bool = False,
) -> Mapping[str, Array]:
    """Shifts and scales of one attention, [heads·head_size] each: k_shift, v_shift, qk_scale, v_scale.

    Args:
        q: samples of the Linear's output, [n, heads·head_size]; k, v: likewise. Without q and k these are not folded.
        proj_input: samples of the context, [n, heads·head_size].
        proj_weight: [heads·head_size, C].
        slices: operands of the products.
        bits: of the operands and of the projection's input.
        alphas: migration strengths tried for v.
        corrected: whether the projection will be compensated: then only what it cannot mend counts.
    """
    head_size = slices.q.shape[-1]
    columns = slices.heads[:, None, None] * head_size + np.arange(head_size)
    k_shift, qk_scale = np.zeros(len(proj_weight), np.float32), np.ones(len(proj_weight), np.float32)
    if q is not None and k is not None:
        k_shift, qk_scale = _search_k(q, k, columns, slices, bits)
    v_shift, v_scale = _search_v(v, proj_input, proj_weight, columns, slices, bits, alphas, corrected=corrected)
    return {"k_shift": k_shift, "v_shift": v_shift, "qk_scale": qk_scale, "v_scale": v_scale}


def _search_k(q: Rows, k: Rows, columns: NDArray[np.int64], slices: Slices, bits: int) -> tuple[Array, Array]:
    """K's shift, and t = (r_q/r_k)^(a/2); judged on scores with each row's mean removed."""
    exact = _centred_scores(slices.q, slices.k)
    q_range = np.maximum(np.abs(np.stack([q.low, q.high])).max(axis=0), SMALLEST)
    q_reaches = (q_range, centres(q)[1][1])
    trials = [
        (shift, ((q_reach / k_reach) ** np.float32(exponent / 2)).astype(np.float32))
        for (shift, k_reach), q_reach in zip(centres(k), q_reaches, strict=True)
        for exponent in EXPONENTS
    ]
    errors = []
    for shift, scale in trials:
        per_slice = scale[columns]
        scaled_q = _fake(slices.q / per_slice, bits)
        scaled_k = _fake((slices.k - shift[columns]) * per_slice, bits)
        errors.append(np.square(_centred_scores(scaled_q, scaled_k) - exact).sum())
    return trials[int(np.argmin(errors))]


def _search_v(
    v: Rows,
    proj_input: Rows,
    proj_weight: Array,
    columns: NDArray[np.int64],
    slices: Slices,
    bits: int,
    alphas: Sequence[float],
    *,
    corrected: bool,
) -> tuple[Array, Array]:
    """V's shift, and s by the error of proj's output: v's own error through P, and the context's as proj's input."""
    importance = np.square(proj_weight).sum(axis=1)[columns]
    (middle, half_range), (mean, _) = centres(v)
    context_mean, deviation = centres(proj_input)[1]
    scales = [np.ones_like(half_range), *(migration_scale(half_range, proj_weight, alpha) for alpha in alphas)]
    powers = [power_scale(deviation, power) for power in POWERS if alphas]
    trials = [(middle, scale) for scale in scales + powers]
    trials += [(shift, scale) for shift in (mean, context_mean) for scale in scales[:1] + powers]
    errors = []
    for shift, scale in trials:
        per_slice = scale[columns]
        shifted = (slices.v - shift[columns]) / per_slice
        v_error = np.matmul(slices.p, (_fake(shifted, bits) - shifted) * per_slice)
        for head in np.unique(slices.heads) if corrected else ():
            v_error[slices.heads == head] -= v_error[slices.heads == head].mean(axis=(0, 1))
        from_v = (
            np.sum(np.square(v_error) * importance) / v_error.shape[1] / len(v_error) * (len(scale) / v_error.shape[2])
        )
        scaled = (proj_input.rows - shift) / scale
        found = _fake(scaled, bits)
        error = uncorrected(found - scaled, found, proj_input.weights) if corrected else found - scaled
        from_input = proj_input.weights @ np.square((error * scale) @ proj_weight).sum(axis=1)
        errors.append(float(from_v + from_input / proj_input.weights.sum()))
    return trials[int(np.argmin(errors))]


def _centred_scores(q: Array, k: Array) -> Array:
    """qkᵀ with each row's mean over the keys removed; [n, T, S]."""
    centred: Array = np.matmul(q, (k - k.mean(axis=1, keepdims=True)).transpose(0, 2, 1))
    return centred


def _fake(values: Array, bits: int) -> Array:
    points = points_of(values, None, float(values.min()), float(values.max()), 0)
    best: ActivationQuantizer = uniform_candidates(points, bits)[0].quantizer
    return fake_quantize(best, values)
