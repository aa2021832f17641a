import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers import opt_m

from mptqc.analysis.candidates import (
    EXTREME_POINTS,
    RANDOM_POINTS,
    Points,
    divisions_of,
    element_error,
    neighbours,
    points_of,
    region_candidates,
    uniform,
    uniform_candidates,
)
from mptqc.graph.quantizer_nodes import check_quantizer
from mptqc.plan import MultiRegion, Uniform
from mptqc.reference.quantizers import fake_quantize

SEEDS = st.integers(0, 2**32 - 1)


def points(values: np.ndarray) -> Points:
    values = values.astype(np.float32)
    return Points(values, np.ones(len(values)), min(float(values.min()), 0.0), max(float(values.max()), 0.0))


def gelu_like(seed: int, count: int = 600) -> np.ndarray:
    """A long tail above, a short one below zero."""
    x = np.random.default_rng(seed).normal(size=count) * 2
    return x / (1 + np.exp(-1.702 * x))


def distribution(kind: str, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return {
        "gelu": gelu_like(seed),
        "softmax": random.dirichlet(np.full(64, 0.1), 8).reshape(-1),
        "normal": random.normal(size=500) * 10 ** random.uniform(-3, 3),
        "negative": -random.exponential(size=500),
        "constant": np.full(100, random.normal()),
        "zeros": np.zeros(100),
    }[kind]


KINDS = st.sampled_from(["gelu", "softmax", "normal", "negative", "constant", "zeros"])


@settings(max_examples=25, deadline=None)
@given(KINDS, SEEDS, st.integers(3, 8), st.integers(2, 4))
def test_regions_fit_eight_bits_and_meet_on_their_grids(kind, seed, bits, regions):
    for scored in region_candidates(points(distribution(kind, seed)), bits, regions):
        quantizer = scored.quantizer
        assert isinstance(quantizer, MultiRegion)
        assert 1 <= len(quantizer.upper) < regions
        check_quantizer(quantizer, "here")


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("below_zero", [False, True])
def test_every_division_is_sound_and_listed_once(bits, below_zero):
    for m, divisions in divisions_of(bits, 4, below_zero=below_zero).items():
        assert len(set(divisions)) == len(divisions)
        for division in divisions:
            quantizer = division.quantizer(bits, m, 1.0)
            check_quantizer(quantizer, "here")
            levels = np.unique(fake_quantize(quantizer, np.arange(-300, 600, 0.5, dtype=np.float32)))
            assert np.array_equal(levels, division.codes(m))


@settings(max_examples=25, deadline=None)
@given(KINDS, SEEDS, st.integers(2, 8))
def test_uniform_codes_fit_their_bits_and_zero_is_exact(kind, seed, bits):
    for scored in uniform_candidates(points(distribution(kind, seed)), bits):
        assert isinstance(scored.quantizer, Uniform)
        assert 0 <= scored.quantizer.zero_point < 2**bits
        assert fake_quantize(scored.quantizer, np.zeros(1, np.float32))[0] == 0


@settings(max_examples=25, deadline=None)
@given(KINDS, SEEDS, st.integers(3, 8))
def test_candidates_come_best_first_with_their_own_error(kind, seed, bits):
    data = points(distribution(kind, seed))
    for candidates in (uniform_candidates(data, bits), region_candidates(data, bits, 4)):
        errors = [scored.error for scored in candidates]
        assert errors == sorted(errors)
        power = float(data.weights @ data.values.astype(np.float64) ** 2 / data.weights.sum())
        exact = [element_error(scored.quantizer, data) for scored in candidates]
        assert errors == pytest.approx(exact, rel=1e-4, abs=1e-6 * power)


@settings(max_examples=25, deadline=None)
@given(KINDS, SEEDS, st.integers(2, 8))
def test_the_best_uniform_is_never_worse_than_min_max(kind, seed, bits):
    data = points(distribution(kind, seed))
    full = element_error(uniform(bits, data.low, data.high), data)
    assert element_error(uniform_candidates(data, bits)[0].quantizer, data) <= full * (1 + 1e-6)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 8))
def test_element_error_is_the_weighted_mean_square(seed, bits):
    random = np.random.default_rng(seed)
    data = points(random.normal(size=50))
    weighted = Points(data.values, random.uniform(0.1, 10, 50), data.low, data.high)
    quantizer = uniform(bits, data.low, data.high)
    total = 0.0
    for value, weight in zip(weighted.values, weighted.weights, strict=True):
        step = np.float32(quantizer.scale)
        code = min(max(np.rint(value / step) + quantizer.zero_point, 0), 2**bits - 1)
        total += weight * float(np.float32(code - quantizer.zero_point) * step - value) ** 2
    assert element_error(quantizer, weighted) == pytest.approx(total / weighted.weights.sum(), rel=1e-5)


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("kind", ["gelu", "softmax"])
def test_two_regions_beat_uniform_on_a_long_tail(kind, bits):
    data = points(distribution(kind, 3))
    assert region_candidates(data, bits, 2)[0].error < uniform_candidates(data, bits)[0].error


def test_uniform_beats_two_regions_on_even_data():
    data = points(np.linspace(-1, 1, 1000))
    assert uniform_candidates(data, 4)[0].error < region_candidates(data, 4, 4)[0].error


def test_two_bits_have_no_second_region():
    assert region_candidates(points(gelu_like(0)), 2, 4) == []


def test_nothing_above_zero_has_no_second_region():
    assert region_candidates(points(distribution("negative", 0)), 4, 4) == []


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 3.0), (-3.0, 0.0), (-1e-20, 1e-20), (0.0, 0.0)])
def test_uniform_spans_its_range(low, high):
    quantizer = uniform(8, low, high)
    ends = np.array([low, high], np.float32)
    assert np.abs(fake_quantize(quantizer, ends) - ends).max() <= quantizer.scale * (0.5 + 1e-4)


def test_neighbours_keep_the_structure():
    two = opt_m(bits=4, scale=0.1, zero_point=1, m=3, low_codes=10)
    near = neighbours(two)
    assert len({one.scale for one in near}) == 7
    assert {(one.zero_point, one.splits) for one in near} == {(0, (8,)), (1, (8,)), (2, (8,))}
    for one in near:
        check_quantizer(one, "here")


@pytest.mark.parametrize(("zero_point", "expected"), [(0, set()), (1, {0, 2}), (15, {14})])
def test_neighbours_of_a_zero_point_are_codes(zero_point, expected):
    near = neighbours(Uniform(bits=4, scale=0.1, zero_point=zero_point))
    assert {one.zero_point for one in near} - {zero_point} == expected


def test_neighbouring_scales_are_float32():
    for near in neighbours(Uniform(bits=4, scale=0.1, zero_point=0)):
        assert near.scale == float(np.float32(near.scale))


def test_points_stand_for_all_elements_and_hold_the_largest():
    values = np.random.default_rng(0).normal(size=(300, 100)).astype(np.float32)
    values[17, 5] = 1000
    found = points_of(values, None, -1.0, 2.0, seed=0)
    assert len(found.values) == RANDOM_POINTS + EXTREME_POINTS
    assert 1000 in found.values
    assert found.weights.sum() == pytest.approx(values.size + EXTREME_POINTS)


def test_points_carry_the_weights_of_their_rows():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = points_of(values, np.array([2, 5], np.float32), 0.0, 5.0, seed=0)
    expected = {0: 2, 1: 2, 2: 2, 3: 5, 4: 5, 5: 5}
    random = dict(zip(found.values[:6].tolist(), found.weights[:6].tolist(), strict=True))
    assert random == expected
    assert found.weights[6:].tolist() == [1] * 6


@pytest.mark.parametrize(("low", "high", "expected"), [(1.0, 2.0, (0.0, 2.0)), (-2.0, -1.0, (-2.0, 0.0))])
def test_a_range_is_widened_to_hold_zero(low, high, expected):
    found = points_of(np.ones((1, 4), np.float32), None, low, high, seed=0)
    assert (found.low, found.high) == expected


def test_a_seed_draws_the_same_points():
    values = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
    one, two, other = (points_of(values, None, -1, 1, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.values, two.values)
    assert not np.array_equal(one.values, other.values)
