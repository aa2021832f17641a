import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptqc.analysis.observe import Rows
from mptqc.analysis.weights import (
    largest_scale,
    search_trellis_scale,
    search_weight_scale,
    second_moment,
    trellis_codes,
)
from mptqc.reference.quantizers import quantize_weight, weight_limits
from mptqc.reference.trellis import TAPS, decode, deviation

Array = np.ndarray
BITS = st.integers(2, 8)
SEEDS = st.integers(0, 2**32 - 1)

# Losses are compared in float64; the search sums K ≤ 24 squares in float32, so a tie may go either way by 24·2⁻²³.
ROUNDING = 1 + 24 * 2.0**-23


def rows_of(values: Array, weights: Array | None = None) -> Rows:
    values = values.astype(np.float32)
    stand_for = np.ones(len(values), np.float32) if weights is None else weights.astype(np.float32)
    return Rows(values, stand_for, values.min(axis=0), values.max(axis=0))


def losses(weight: Array, scale: Array, bits: int, moment: Array) -> Array:
    """e_nᵀ H e_n per output channel, in float64."""
    error = (quantize_weight(weight, scale, bits) * scale - weight).astype(np.float64)
    return np.einsum("kn,kj,jn->n", error, moment.astype(np.float64), error)


def random_weight(seed: int) -> Array:
    random = np.random.default_rng(seed)
    return (random.standard_t(3, size=(24, 7)) * 10 ** random.uniform(-3, 3, 7)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(SEEDS, BITS)
def test_the_largest_scale_clips_nothing(seed, bits):
    weight = random_weight(seed)
    scale = largest_scale(weight, bits)
    codes = np.rint(weight / scale)
    low, high = weight_limits(bits)
    assert codes.min() >= low
    assert codes.max() <= high
    assert (np.abs(codes).max(axis=0) == high).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS, BITS)
def test_the_search_is_never_worse_than_the_largest_scale(seed, bits):
    weight = random_weight(seed)
    identity = np.eye(len(weight), dtype=np.float32)
    found = losses(weight, search_weight_scale(weight, bits, None), bits, identity)
    assert (found <= losses(weight, largest_scale(weight, bits), bits, identity) * ROUNDING).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS, BITS)
def test_nor_by_the_error_of_the_output(seed, bits):
    weight = random_weight(seed)
    random = np.random.default_rng(seed + 1)
    moment = second_moment(rows_of(random.normal(size=(100, 24)) * 10 ** random.uniform(-1, 1, 24)))
    found = losses(weight, search_weight_scale(weight, bits, moment), bits, moment)
    # eᵀHe in float32: K² terms, of which cancellation leaves the most part only where H is far from singular, as here.
    assert (found <= losses(weight, largest_scale(weight, bits), bits, moment) * (1 + 1e-3)).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_low_bits_clip_the_tail(bits):
    weight = np.random.default_rng(0).standard_t(3, size=(256, 4)).astype(np.float32)
    assert (search_weight_scale(weight, bits, None) < 0.95 * largest_scale(weight, bits)).all()


def test_the_moment_says_which_weights_matter():
    weight = np.array([[1.0], [0.3], [0.3], [0.3]], np.float32)
    outlier_matters = np.diag([100, 1, 1, 1]).astype(np.float32)
    rest_matters = np.diag([0.01, 1, 1, 1]).astype(np.float32)
    large, small = (search_weight_scale(weight, 3, moment)[0] for moment in (outlier_matters, rest_matters))
    assert small < large


def test_channels_do_not_depend_on_each_other():
    weight = random_weight(4)
    together = search_weight_scale(weight, 4, None)
    alone = [search_weight_scale(weight[:, [n]], 4, None)[0] for n in range(weight.shape[1])]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("moment", [None, np.eye(4, dtype=np.float32), np.zeros((4, 4), np.float32)])
def test_a_channel_of_zeros_gets_a_scale_above_zero(moment):
    scale = search_weight_scale(np.zeros((4, 2), np.float32), 4, moment)
    assert (scale > 0).all()
    assert scale.dtype == np.float32


def test_second_moment_weighs_rows():
    random = np.random.default_rng(0)
    values, weights = random.normal(size=(20, 3)), random.uniform(1, 9, 20)
    expected = sum(w * np.outer(x, x) for w, x in zip(weights, values, strict=True)) / weights.sum()
    np.testing.assert_allclose(second_moment(rows_of(values, weights)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", sorted(TAPS))
def test_scales_for_a_trellis_follow_the_tails(bits):
    random = np.random.default_rng(bits)
    weight = np.concatenate([random.uniform(-1, 1, (400, 40)), random.standard_t(3, (400, 40))], axis=1)
    weight = (weight / weight.std(axis=0)).astype(np.float32)
    scale = search_trellis_scale(weight, np.ones(len(weight), np.float32), bits)
    assert np.median(scale[:40]) < np.median(scale[40:])
    fixed = np.full(80, 1 / deviation(bits), np.float32)
    found, plain = (
        np.square(decode(trellis_codes(weight, one, bits), bits) * one - weight).sum() for one in (scale, fixed)
    )
    assert found < plain


def test_scales_for_a_trellis_keep_what_counts():
    weight = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)
    weight[101] = 5.0
    counts = np.ones(200, np.float32)
    plain = search_trellis_scale(weight, counts, 2)
    counts[101] = 40
    assert (search_trellis_scale(weight, counts, 2) > plain).all()


def test_a_channel_of_zeros_gets_a_scale_above_zero_for_a_trellis_too():
    weight = np.zeros((4, 2), np.float32)
    scale = search_trellis_scale(weight, np.ones(4, np.float32), 3)
    assert (scale > 0).all()
    assert scale.dtype == np.float32
    assert np.isfinite(decode(trellis_codes(weight, scale, 3), 3) * scale).all()
