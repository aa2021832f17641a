import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptqc.analysis.candidates import element_error, points_of, uniform
from mptqc.analysis.observe import Rows, Slices
from mptqc.analysis.ranges import attention_searches, linear_input_search, output_factor, search_quantizer
from mptqc.plan import ActivationQuantizer, MultiRegion, Uniform
from mptqc.recipe import RangeMethod
from mptqc.reference.quantizers import fake_quantize

Array = np.ndarray
SEEDS = st.integers(0, 2**32 - 1)

# Errors are compared in float64 here and summed in float32 there, over at most 2¹⁴ terms added in pairs: 14 roundings,
# plus those of the product with the factor, of 16 terms. A tie may go either way by this much.
ROUNDING = 1 + 64 * 2.0**-24


def rows_of(values: Array, weights: Array | None = None) -> Rows:
    values = values.astype(np.float32)
    stand_for = np.ones(len(values), np.float32) if weights is None else weights.astype(np.float32)
    return Rows(values, stand_for, values.min(axis=0), values.max(axis=0))


def linear_error(quantizer: ActivationQuantizer, rows: Rows, weights: list[Array]) -> float:
    """Σ w ‖(Q(x) − x)W‖² over all readers, in float64."""
    error = (fake_quantize(quantizer, rows.rows) - rows.rows).astype(np.float64)
    return float(sum(rows.weights @ np.square(error @ weight).sum(axis=1) for weight in weights))


def min_max(rows: Rows, bits: int) -> Uniform:
    return uniform(bits, min(float(rows.low.min()), 0.0), max(float(rows.high.max()), 0.0))


def long_tailed(seed: int) -> Array:
    """As after GELU, with a few massive values."""
    x = np.random.default_rng(seed).standard_t(3, size=(200, 12)) * 2
    return x / (1 + np.exp(-1.702 * np.clip(x, -50, 50)))


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(2, 8), st.integers(1, 4))
def test_the_search_by_output_is_never_worse_than_min_max(seed, bits, regions):
    random = np.random.default_rng(seed)
    rows = rows_of(random.standard_t(3, size=(100, 8)) * 10 ** random.uniform(-1, 1, 8), random.uniform(1, 50, 100))
    weights = [random.normal(size=(8, width)).astype(np.float32) for width in (3, 12)]
    found = linear_input_search(rows, weights, RangeMethod.OUTPUT, regions=regions, seed=0)(bits)
    assert linear_error(found, rows, weights) <= linear_error(min_max(rows, bits), rows, weights) * ROUNDING


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(2, 8))
def test_the_search_by_elements_is_never_worse_than_min_max(seed, bits):
    points = points_of(long_tailed(seed).astype(np.float32), None, -0.2, 60.0, 0)
    found = search_quantizer(points, bits, RangeMethod.MSE, regions=4, output_error=never)
    assert element_error(found, points) <= element_error(uniform(bits, points.low, points.high), points)


def found_on_a_long_tail(bits: int, regions: int) -> tuple[ActivationQuantizer, float]:
    """The quantizer that is found, and its error in the Linear."""
    rows = rows_of(long_tailed(1))
    weights = [np.random.default_rng(2).normal(size=(12, 12)).astype(np.float32)]
    found = linear_input_search(rows, weights, RangeMethod.OUTPUT, regions=regions, seed=0)(bits)
    return found, linear_error(found, rows, weights)


def never(quantizer: ActivationQuantizer) -> float:
    raise AssertionError("this method does not look at outputs")


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_a_long_tail_gets_two_regions_and_gains(bits):
    (plain, plain_error), (two, two_error) = (found_on_a_long_tail(bits, regions) for regions in (1, 2))
    assert isinstance(plain, Uniform)
    assert isinstance(two, MultiRegion)
    assert len(two.upper) == 1
    assert two_error < 0.8 * plain_error


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_more_regions_gain_on_a_long_tail(bits):
    (_, two_error), (four, four_error) = (found_on_a_long_tail(bits, regions) for regions in (2, 4))
    assert isinstance(four, MultiRegion)
    assert len(four.upper) >= 2
    assert four_error < 0.9 * two_error


@pytest.mark.parametrize(("gain", "expected"), [(1.0, 0), (1.09, 0), (1.11, 3)])
def test_each_region_more_must_divide_the_error_by_its_worth(gain, expected):
    points = points_of(long_tailed(1).astype(np.float32), None, -0.2, 60.0, 0)

    def error(quantizer: ActivationQuantizer) -> float:
        return gain ** -len(getattr(quantizer, "upper", ()))

    found = search_quantizer(points, 4, RangeMethod.OUTPUT, regions=4, output_error=error)
    assert len(getattr(found, "upper", ())) == expected


def test_even_data_stays_uniform():
    rows = rows_of(np.random.default_rng(0).uniform(0, 1, (300, 8)))
    weights = [np.eye(8, dtype=np.float32)]
    found = linear_input_search(rows, weights, RangeMethod.OUTPUT, regions=4, seed=0)(4)
    assert isinstance(found, Uniform)


def test_the_output_decides_not_the_elements():
    """A channel that no output reads may be clipped away; by element error its range would count."""
    values = np.random.default_rng(0).uniform(-1, 1, (400, 2))
    values[:, 1] *= 6
    rows, blind = rows_of(values), np.array([[1.0], [0.0]], np.float32)
    by_output, by_element = (
        linear_input_search(rows, [blind], method, regions=1, seed=0)(4)
        for method in (RangeMethod.OUTPUT, RangeMethod.MSE)
    )
    assert by_output.scale < by_element.scale / 2


def test_min_max_spans_all_the_data_not_only_the_sample():
    rows = Rows(np.ones((4, 2), np.float32), np.ones(4, np.float32), np.array([-3.0, 0]), np.array([1.0, 12.0]))
    found = linear_input_search(rows, [np.eye(2, dtype=np.float32)], RangeMethod.MIN_MAX, regions=1, seed=0)(8)
    assert found == uniform(8, -3.0, 12.0)


def test_percentile_leaves_the_outermost_values_out():
    values = np.random.default_rng(0).uniform(0, 1, 30_000).astype(np.float32)
    values[7] = 1e6
    points = points_of(values.reshape(-1, 1), np.full(30_000, 100, np.float32), 0.0, 1e6, 0)
    found = search_quantizer(points, 8, RangeMethod.PERCENTILE, regions=1, output_error=never)
    assert found.scale * 255 == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("method", RangeMethod)
def test_without_opt_m_every_method_stays_uniform(method):
    rows = rows_of(long_tailed(1))
    found = linear_input_search(rows, [np.eye(12, dtype=np.float32)], method, regions=1, seed=0)(4)
    assert isinstance(found, Uniform)
    assert found.bits == 4


def test_the_same_seed_finds_the_same():
    rows, weights = rows_of(long_tailed(1)), [np.eye(12, dtype=np.float32)]
    one, two = (linear_input_search(rows, weights, RangeMethod.OUTPUT, regions=4, seed=3)(4) for _ in range(2))
    assert one == two


def test_rows_that_stand_for_many_count_more():
    values = np.concatenate([np.random.default_rng(0).uniform(-1, 1, (200, 1)), np.full((1, 1), 30.0)])
    heavy = np.concatenate([np.ones(200), [1000]])
    light = np.concatenate([np.ones(200), [1e-3]])
    scales = [
        linear_input_search(
            rows_of(values, weights), [np.ones((1, 1), np.float32)], RangeMethod.OUTPUT, regions=1, seed=0
        )(4).scale
        for weights in (heavy, light)
    ]
    assert scales[0] > 3 * scales[1]


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_the_output_factor_keeps_lengths(seed, inputs, widths):
    random = np.random.default_rng(seed)
    weights = [random.normal(size=(inputs, width)).astype(np.float32) for width in widths]
    error = random.normal(size=(5, inputs)).astype(np.float32)
    factor = output_factor(weights)
    assert factor.shape[0] == inputs
    assert factor.shape[1] <= max(inputs, 1)
    expected = sum(np.square(error @ weight).sum(axis=1) for weight in weights)
    np.testing.assert_allclose(np.square(error @ factor).sum(axis=1), expected, rtol=1e-4, atol=1e-5)


def slices_of(seed: int, count: int = 6, tokens: int = 10, size: int = 4) -> Slices:
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_t(4, size=(count, tokens, size)).astype(np.float32) for _ in range(3))
    scores = q @ k.transpose(0, 2, 1) * 2
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return Slices(q, k, (p / p.sum(axis=-1, keepdims=True)).astype(np.float32), v, np.zeros(count, np.int64))


def product_errors(letter: str, quantizer: ActivationQuantizer, slices: Slices) -> float:
    """The error that one quantized operand makes in its product; scores have each row's mean removed."""
    q, k, p, v = (array.astype(np.float64) for array in (slices.q, slices.k, slices.p, slices.v))
    exact = getattr(slices, letter)
    error = (fake_quantize(quantizer, exact) - exact).astype(np.float64)
    made = {
        "q": lambda: error @ k.transpose(0, 2, 1),
        "k": lambda: q @ error.transpose(0, 2, 1),
        "p": lambda: error @ v,
        "v": lambda: p @ error,
    }[letter]()
    if letter in "qk":
        made = made - made.mean(axis=-1, keepdims=True)
    return float(np.square(made).sum())


@settings(max_examples=8, deadline=None)
@given(SEEDS, st.integers(3, 8))
def test_every_operand_is_no_worse_than_min_max_in_its_product(seed, bits):
    slices = slices_of(seed)
    searches = attention_searches(slices, RangeMethod.OUTPUT, regions=4, seed=0)
    for letter in "qkpv":
        values = getattr(slices, letter)
        full = uniform(bits, min(float(values.min()), 0.0), max(float(values.max()), 0.0))
        # The searches of q and k expand the square (eHe): cancellation costs some digits more.
        limit = product_errors(letter, full, slices) * (1 + 1e-4)
        assert product_errors(letter, searches[letter](bits), slices) <= limit, letter


def test_only_probabilities_may_have_several_regions():
    searches = attention_searches(slices_of(1), RangeMethod.OUTPUT, regions=4, seed=0)
    assert isinstance(searches["p"](4), MultiRegion)
    assert all(isinstance(searches[letter](4), Uniform) for letter in "qkv")
    plain = attention_searches(slices_of(1), RangeMethod.OUTPUT, regions=1, seed=0)
    assert isinstance(plain["p"](4), Uniform)


def test_what_softmax_cannot_see_does_not_count():
    """A constant added to all keys changes each row of scores by a constant, so k's quantizer answers for the rest."""
    slices = slices_of(0)
    keys = Slices(slices.q, slices.k * np.float32(0.01) + np.float32(0.5), slices.p, slices.v, slices.heads)
    found = attention_searches(keys, RangeMethod.OUTPUT, regions=1, seed=0)["k"](8)
    assert product_errors("k", found, keys) < product_errors("k", uniform(8, 0.0, float(keys.k.max())), keys) * 1.0001
