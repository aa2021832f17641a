"""Ridge, GPTQ and bias refit against their definitions."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mptqc.analysis.gptq import Factor, Moments, gptq, refit_bias, ridge, rows_to_round
from mptqc.analysis.weights import largest_scale, search_trellis_scale, search_weight_scale, trellis_codes
from mptqc.reference.quantizers import quantize_weight, weight_limits
from mptqc.reference.trellis import TAPS, decode

Array = NDArray[np.float32]
FLOAT32_SUM = 1e-4
"""Products of a few hundred float32 terms, each right to 6e-8 of values near 1."""


def correlated_rows(count: int, width: int, seed: int) -> Array:
    random = np.random.default_rng(seed)
    mix = random.standard_normal((width, width)) * np.geomspace(1, 0.05, width)
    return (random.standard_normal((count, width)) @ mix + 1.0).astype(np.float32)


def moments_of(x: Array, target: Array) -> Moments:
    parts = np.array_split(np.arange(len(x)), 3)
    moments = Moments.around(x[parts[0]], target[parts[0]])
    for part in parts:
        moments.add(x[part], target[part])
    return moments


def output_error(x: Array, weight: NDArray[np.floating], target: Array) -> float:
    error = x @ weight - target
    return float(np.square(error - error.mean(axis=0)).sum())


def test_moments_of_batches_are_the_centred_moments_of_all_rows() -> None:
    x, target = correlated_rows(301, 7, 0), correlated_rows(301, 5, 1)
    moments = moments_of(x, target)
    centred, centred_target = x - x.mean(axis=0), target - target.mean(axis=0)
    np.testing.assert_allclose(moments.hessian, centred.T @ centred / 301, atol=FLOAT32_SUM)
    np.testing.assert_allclose(moments.cross, centred.T @ centred_target / 301, atol=FLOAT32_SUM)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_codes_are_in_range_and_better_than_nearest(bits: int) -> None:
    x = correlated_rows(600, 150, 2)
    weight = np.random.default_rng(3).standard_normal((150, 19)).astype(np.float32)
    scale = largest_scale(weight, bits)
    codes = gptq(Factor.of(moments_of(x, x @ weight).hessian), weight, scale, bits)
    low, high = weight_limits(bits)
    assert codes.min() >= low
    assert codes.max() <= high
    nearest = output_error(x, quantize_weight(weight, scale, bits) * scale, x @ weight)
    assert output_error(x, codes * scale, x @ weight) < 0.7 * nearest


@pytest.mark.parametrize("bits", sorted(TAPS))
def test_gptq_codes_of_a_trellis_are_better_than_the_nearest(bits: int) -> None:
    x = correlated_rows(600, 150, 2)
    weight = np.random.default_rng(3).standard_normal((150, 19)).astype(np.float32)
    hessian = moments_of(x, x @ weight).hessian
    factor = Factor.of(hessian)
    uniform_scale = search_weight_scale(weight, bits, hessian.astype(np.float32))
    scale = search_trellis_scale(rows_to_round(factor, weight, uniform_scale, bits), factor.counts, bits)
    codes = gptq(factor, weight, scale, bits, by_trellis=True)
    nearest = output_error(x, decode(trellis_codes(weight, scale, bits), bits) * scale, x @ weight)
    assert output_error(x, decode(codes, bits) * scale, x @ weight) < 0.7 * nearest


def test_rows_come_to_be_rounded_as_the_errors_before_leave_them() -> None:
    x = correlated_rows(600, 150, 2)
    weight = np.random.default_rng(3).standard_normal((150, 19)).astype(np.float32)
    factor, scale = Factor.of(moments_of(x, x @ weight).hessian), largest_scale(weight, 4)
    rows, codes = rows_to_round(factor, weight, scale, 4), gptq(factor, weight, scale, 4)
    np.testing.assert_array_equal(rows[factor.order[0]], weight[factor.order[0]])
    np.testing.assert_array_equal(quantize_weight(rows, scale, 4), codes)
    assert not np.array_equal(quantize_weight(weight, scale, 4), codes)


def test_gptq_of_independent_inputs_is_rounding_to_nearest() -> None:
    weight = np.random.default_rng(4).standard_normal((130, 11)).astype(np.float32)
    scale = largest_scale(weight, 4)
    codes = gptq(Factor.of(np.eye(130)), weight, scale, 4)
    np.testing.assert_array_equal(codes, quantize_weight(weight, scale, 4))


def test_ridge_recovers_what_a_noisy_input_loses() -> None:
    x = correlated_rows(2000, 12, 5)
    weight = np.random.default_rng(6).standard_normal((12, 8)).astype(np.float32)
    target = x @ weight
    noisy = np.rint(x / 2) * 2
    fit, held_out = moments_of(noisy[:1500], target[:1500]), moments_of(noisy[1500:], target[1500:])
    assert output_error(noisy, ridge(fit, held_out, weight), target) < 0.98 * output_error(noisy, weight, target)


def test_ridge_leaves_weights_alone_where_it_would_fit_noise() -> None:
    random = np.random.default_rng(7)
    x = random.standard_normal((40, 30)).astype(np.float32)
    weight = random.standard_normal((30, 4)).astype(np.float32)
    target = x @ weight + 5 * random.standard_normal((40, 4)).astype(np.float32)
    held_x = random.standard_normal((4000, 30)).astype(np.float32)
    fit, held_out = moments_of(x, target), moments_of(held_x, held_x @ weight)
    np.testing.assert_array_equal(ridge(fit, held_out, weight), weight)


def test_refitted_bias_makes_the_mean_output_right() -> None:
    x = correlated_rows(500, 9, 8)
    target = correlated_rows(500, 6, 9)
    scale = np.full(6, 0.25, np.float32)
    codes = np.random.default_rng(10).integers(-8, 8, (9, 6)).astype(np.int8)
    bias = refit_bias(moments_of(x, target), codes, scale)
    np.testing.assert_allclose((x @ (codes * scale) + bias).mean(axis=0), target.mean(axis=0), atol=FLOAT32_SUM)


def test_a_constant_input_leaves_the_weight_as_it_is() -> None:
    x, weight = np.full((40, 9), 31.7, np.float32), np.random.default_rng(5).standard_normal((9, 4)).astype(np.float32)
    target = x @ weight
    moments = moments_of(x, target)
    scale = largest_scale(weight, 4)
    codes = gptq(Factor.of(moments.hessian), ridge(moments, moments, weight), scale, 4)
    np.testing.assert_array_equal(codes, quantize_weight(weight, scale, 4))
    np.testing.assert_allclose(refit_bias(moments, codes, scale), target[0] - x[0] @ (codes * scale), rtol=1e-5)
