import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptqc.analysis.candidates import points_of, uniform_candidates
from mptqc.analysis.observe import Rows, Slices
from mptqc.analysis.smoothing import (
    LARGEST_RATIO,
    POWERS,
    centres,
    migration_scale,
    plan_attention,
    plan_norm,
    power_scale,
)
from mptqc.analysis.weights import search_weight_scale
from mptqc.reference.quantizers import fake_quantize, quantize_weight

Array = np.ndarray
SEEDS = st.integers(0, 2**32 - 1)
ALPHAS = (0.5, 0.7, 0.85, 1.0)
EPSILON = 2.0**-24


def rows_of(values: Array) -> Rows:
    values = values.astype(np.float32)
    return Rows(values, np.ones(len(values), np.float32), values.min(axis=0), values.max(axis=0))


def uneven(seed: int, rows: int = 200, channels: int = 8) -> Array:
    """Channels of very different size and centre, as after a LayerNorm with massive activations."""
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, channels)) * 10 ** random.uniform(-1, 1.5, channels) + random.normal(
        size=channels
    ) * 10 ** random.uniform(-1, 1.5, channels)


def weight_of(seed: int, inputs: int = 8, outputs: int = 6) -> Array:
    return np.random.default_rng(seed + 1).normal(size=(inputs, outputs)).astype(np.float32)


def quantized_error(values: Array, weight: Array, shift: Array, scale: Array, bits: int) -> float:
    """‖Q(x')Q(W') − x'W'‖² with the best uniform quantizer by element error, as the plan will find at least."""
    smoothed = ((values - shift) / scale).astype(np.float32)
    scaled = (scale[:, None] * weight).astype(np.float32)
    points = points_of(smoothed, None, float(smoothed.min()), float(smoothed.max()), 0)
    quantizer = uniform_candidates(points, bits)[0].quantizer
    weight_scale = search_weight_scale(scaled, bits, None)
    product = fake_quantize(quantizer, smoothed) @ (quantize_weight(scaled, weight_scale, bits) * weight_scale)
    return float(np.square(product.astype(np.float64) - smoothed.astype(np.float64) @ scaled).sum())


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(2, 8))
def test_smoothing_keeps_the_exact_product(seed, bits):
    values, weight = uneven(seed), weight_of(seed)
    found = plan_norm(rows_of(values), [weight], bits, bits, ALPHAS, 0)
    shift, scale = found.shift.astype(np.float64), found.scale.astype(np.float64)
    smoothed = (values - shift) / scale
    np.testing.assert_allclose(
        smoothed @ (scale[:, None] * weight) + shift @ weight, values @ weight, rtol=1e-9, atol=1e-9
    )


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(3, 8))
def test_smoothing_is_never_worse_than_none(seed, bits):
    values, weight = uneven(seed).astype(np.float32), weight_of(seed)
    found = plan_norm(rows_of(values), [weight], bits, bits, ALPHAS, 0)
    left_alone = quantized_error(values, weight, np.zeros(8), np.ones(8), bits)
    # The search sums 200·6 squares in float32, over values whose own products were rounded.
    assert quantized_error(values, weight, found.shift, found.scale, bits) <= left_alone * (1 + 1e-3)


def test_an_uneven_norm_is_smoothed_and_gains():
    values, weight = uneven(3).astype(np.float32), weight_of(3)
    found = plan_norm(rows_of(values), [weight], 4, 4, ALPHAS, 0)
    assert found.alpha in ALPHAS
    left_alone = quantized_error(values, weight, np.zeros(8), np.ones(8), 4)
    assert quantized_error(values, weight, found.shift, found.scale, 4) < 0.7 * left_alone


def test_without_strengths_a_norm_is_left_alone():
    found = plan_norm(rows_of(uneven(3)), [weight_of(3)], 4, 4, (), 0)
    assert found.alpha is None
    np.testing.assert_array_equal(found.shift, 0)
    np.testing.assert_array_equal(found.scale, 1)


def test_centres_are_the_middle_of_the_range_and_the_mean():
    values = uneven(3)
    rows = rows_of(values)
    (middle, half_range), (mean, deviation) = centres(rows)
    np.testing.assert_allclose(rows.high - middle, middle - rows.low, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(half_range, (rows.high - rows.low) / 2, rtol=1e-6)
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(deviation, values.std(axis=0), rtol=1e-3)


def test_the_shift_is_one_of_the_centres():
    rows = rows_of(uneven(3))
    found = plan_norm(rows, [weight_of(3)], 4, 4, (0.7,), 0)
    assert found.alpha in (0.7, *POWERS)
    assert any(np.array_equal(found.shift, centre) for centre, _ in centres(rows))


def test_massive_rows_do_not_decide_how_the_rest_is_scaled():
    """Scales by deviation keep channels alike where one row reaches far in some of them."""
    values = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    values[0, :4] = 30
    deviation, half_range = centres(rows_of(values))[1][1], centres(rows_of(values))[0][1]
    assert np.ptp(np.log(power_scale(deviation, 0.6))) < 0.5 * np.ptp(np.log(power_scale(half_range, 0.6)))


def test_all_readers_count():
    """A second reader that reads one channel alone moves that channel's scale."""
    rows = rows_of(uneven(4))
    second = np.zeros((8, 6), np.float32)
    second[2] = 50
    alone, both = (plan_norm(rows, weights, 4, 4, (0.7,), 0) for weights in ([weight_of(4)], [weight_of(4), second]))
    assert alone.alpha == both.alpha == 0.7
    ratio = both.scale / alone.scale
    assert ratio[2] < ratio[[0, 1, 3, 4, 5, 6, 7]].min() / 2


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0, 1, allow_subnormal=False))
def test_migration_scale_is_the_formula_with_geometric_mean_one(seed, alpha):
    random = np.random.default_rng(seed)
    reach = (10 ** random.uniform(-1, 1, 8)).astype(np.float32)
    weight = weight_of(seed)
    scale = migration_scale(reach, weight, alpha)
    formula = reach.astype(np.float64) ** alpha / np.abs(weight).max(axis=1).astype(np.float64) ** (1 - alpha)
    np.testing.assert_allclose(scale, formula / np.exp(np.log(formula).mean()), rtol=1e-5)


def test_migration_scale_is_bounded_and_above_zero():
    reach = np.array([1e-6, 1e-6, 1e30], np.float32)
    scale = migration_scale(reach, np.zeros((3, 2), np.float32), 1.0)
    assert (scale > 0).all()
    assert scale.max() <= LARGEST_RATIO * (1 + 4 * EPSILON)
    assert scale.min() >= (1 - 4 * EPSILON) / LARGEST_RATIO


HEADS, SIZE, TOKENS, COUNT = 2, 4, 9, 6


def attention(seed: int) -> tuple[Rows, Rows, Rows, Rows, Array, Slices]:
    """q, k, v and context as rows, proj's weight, and slices of the same data."""
    q, k, v = (uneven(seed + i, COUNT * TOKENS, HEADS * SIZE).astype(np.float32) / 4 for i in range(3))
    heads = np.tile(np.arange(HEADS), COUNT)
    parted = [
        a.reshape(COUNT, TOKENS, HEADS, SIZE).transpose(0, 2, 1, 3).reshape(COUNT * HEADS, TOKENS, SIZE)
        for a in (q, k, v)
    ]
    scores = parted[0] @ parted[1].transpose(0, 2, 1)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p = (p / p.sum(axis=-1, keepdims=True)).astype(np.float32)
    context = (p @ parted[2]).reshape(COUNT, HEADS, TOKENS, SIZE).transpose(0, 2, 1, 3).reshape(-1, HEADS * SIZE)
    slices = Slices(parted[0], parted[1], p, parted[2], heads)
    return rows_of(q), rows_of(k), rows_of(v), rows_of(context), weight_of(seed, HEADS * SIZE, 5), slices


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.integers(3, 8))
def test_attention_folds_are_vectors_of_scales_above_zero(seed, bits):
    *rows, weight, slices = attention(seed)
    found = plan_attention(*rows, weight, slices, bits, ALPHAS)
    assert set(found) == {"k_shift", "v_shift", "qk_scale", "v_scale"}
    for key, vector in found.items():
        assert vector.shape == (HEADS * SIZE,)
        assert vector.dtype == np.float32, key
        assert np.isfinite(vector).all()
    assert (found["qk_scale"] > 0).all()
    assert (found["v_scale"] > 0).all()


def test_attention_shifts_are_the_middle_of_each_channel():
    q, k, v, context, weight, slices = attention(0)
    found = plan_attention(q, k, v, context, weight, slices, 4, ALPHAS)
    np.testing.assert_allclose(found["k_shift"], (k.high + k.low) / 2, rtol=1e-6)
    np.testing.assert_allclose(found["v_shift"], (v.high + v.low) / 2, rtol=1e-6)


def test_a_context_far_from_zero_decides_the_shift_of_v():
    q, k, v, context, weight, slices = attention(0)
    slices.p[...] = 1 / TOKENS  # v's own error is lost in the mean of many
    far = rows_of(context.rows + np.where(np.arange(HEADS * SIZE) % 2, 20, -20).astype(np.float32))
    found = plan_attention(q, k, v, far, weight, slices, 4, ALPHAS, corrected=True)
    np.testing.assert_allclose(found["v_shift"], far.rows.mean(axis=0), rtol=1e-5)


def centred_scores(q: Array, k: Array) -> Array:
    scores = q.astype(np.float64) @ k.transpose(0, 2, 1)
    return scores - scores.mean(axis=-1, keepdims=True)


def fake(values: Array, bits: int) -> Array:
    points = points_of(values, None, float(values.min()), float(values.max()), 0)
    return fake_quantize(uniform_candidates(points, bits)[0].quantizer, values)


@settings(max_examples=8, deadline=None)
@given(SEEDS, st.integers(3, 8))
def test_the_scale_of_q_and_k_is_never_worse_than_none(seed, bits):
    *rows, weight, slices = attention(seed)
    found = plan_attention(*rows, weight, slices, bits, ALPHAS)
    columns = slices.heads[:, None, None] * SIZE + np.arange(SIZE)
    exact = centred_scores(slices.q, slices.k)
    errors = []
    for scale in (found["qk_scale"], np.ones(HEADS * SIZE, np.float32)):
        q, k = slices.q / scale[columns], (slices.k - found["k_shift"][columns]) * scale[columns]
        errors.append(np.square(centred_scores(fake(q, bits), fake(k, bits)) - exact).sum())
    assert errors[0] <= errors[1] * (1 + 1e-4)


def test_no_alpha_leaves_v_unscaled():
    *rows, weight, slices = attention(0)
    np.testing.assert_array_equal(plan_attention(*rows, weight, slices, 4, ())["v_scale"], 1)


def test_the_same_data_gives_the_same_folds():
    *rows, weight, slices = attention(0)
    one, two = (plan_attention(*rows, weight, slices, 4, ALPHAS) for _ in range(2))
    assert all(np.array_equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dead_channel_keeps_a_finite_scale(bits):
    values = uneven(3)
    values[:, 5] = 0
    found = plan_norm(rows_of(values), [weight_of(3)], bits, bits, ALPHAS, 0)
    assert np.isfinite(found.scale).all()
    assert (found.scale > 0).all()
