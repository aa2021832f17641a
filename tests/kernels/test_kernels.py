"""Each implementation against the numpy reference and against the portable one, at sizes that break vector widths."""

import ctypes
import platform
from dataclasses import replace

import numpy as np
import pytest
from code_quantizers import PROBABILITIES, QUANTIZERS, UNIFORM
from kernel_records import LayerNormAdd

from mptqc.reference import custom_ops as ops
from mptqc.reference.custom_op_bounds import output_bounds

OK = 0
SCALES = ops.AttentionScales(0.021, 117, 0.019, 133, 0.013, 126)


def floats(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape).astype(np.float32)


def codes(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.integers(0, 256, shape, np.uint8)


def assert_codes_of(actual: np.ndarray, quantizer: ops.CodeQuantizer, y: np.ndarray, tolerance: np.ndarray) -> None:
    """The codes are those of floats within `tolerance` of y."""
    low = ops.quantize_codes(quantizer, (y - tolerance).astype(np.float32))
    high = ops.quantize_codes(quantizer, (y + tolerance).astype(np.float32))
    assert ((low <= actual) & (actual <= high)).all()
    assert low.size < 1000 or (low == high).mean() > 0.99  # the bounds are no free pass


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 15), (2, 16), (33, 17), (5, 111), (65, 384)])
def test_layer_norm(kernels, kernels_of, quantizer, rows, width):
    generator = np.random.default_rng(rows + width)
    x = floats(generator, rows, width) * 3 + 1
    gamma, beta = floats(generator, width), floats(generator, width)
    actual = kernels.layer_norm(x, gamma, beta, 1e-6, quantizer)
    assert np.array_equal(actual, kernels_of("portable").layer_norm(x, gamma, beta, 1e-6, quantizer))
    y = ops.layer_norm(x, gamma, beta, 1e-6)
    size = (np.abs(ops.layer_norm(x, gamma, 0 * beta, 1e-6)) + np.abs(beta)).max(-1, keepdims=True, initial=0)
    assert_codes_of(actual, quantizer, y, ops.LAYER_NORM_TOLERANCE * size)


def test_layer_norm_moves_rows(kernels):
    generator = np.random.default_rng(0)
    x, ones, zeros = floats(generator, 3, 35, 24), np.ones(24, np.float32), np.zeros(24, np.float32)
    rows = generator.permutation(35)
    straight = kernels.layer_norm(x, ones, zeros, 1e-6, UNIFORM)
    assert np.array_equal(kernels.layer_norm(x, ones, zeros, 1e-6, UNIFORM, rows), straight[:, rows])


@pytest.mark.parametrize("quantizer", [None, *QUANTIZERS])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("rows", "width"), [(0, 8), (1, 1), (3, 15), (2, 16), (33, 17), (7, 48), (5, 111), (70, 96), (65, 384)]
)
def test_layer_norm_add(kernels, kernels_of, quantizer, adds, rows, width):
    generator = np.random.default_rng(rows + width)
    x, gamma, beta = floats(generator, rows, width) * 3 + 1, floats(generator, width), floats(generator, width)
    arguments = {"residual": floats(generator, rows, width) if adds else None, "quantizer": quantizer}
    actual = kernels.layer_norm_add(x, gamma, beta, 1e-6, **arguments)
    portable = kernels_of("portable").layer_norm_add(x, gamma, beta, 1e-6, **arguments)
    assert all(np.array_equal(mine, its) for mine, its in zip(actual, portable, strict=True))
    if quantizer is not None:
        actual, its_codes = actual
        assert np.array_equal(its_codes, ops.quantize_codes(quantizer, actual))
    inputs = [x, gamma, beta, arguments["residual"]]
    ((low, high),) = output_bounds("LayerNormAdd", {"epsilon": 1e-6}, inputs)
    assert ((low <= actual) & (actual <= high)).all()


@pytest.mark.parametrize("quantizer", [None, QUANTIZERS[0]])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (9, 17), (70, 96)])
def test_a_norms_sum_may_take_the_residuals_place(kernels, quantizer, rows, width):
    generator = np.random.default_rng(rows)
    x, residual = floats(generator, rows, width), floats(generator, rows, width)
    inputs = (x, floats(generator, width), floats(generator, width), 1e-6)
    arguments = {"residual": residual, "quantizer": quantizer, "rows": generator.permutation(rows)}
    expected = kernels.layer_norm_add(*inputs, **arguments)
    actual = kernels.layer_norm_add(*inputs, **arguments, in_place=True)
    assert all(np.array_equal(mine, its) for mine, its in zip(actual, expected, strict=True))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("moves", ["rows", "codes", "both", "both, groups of other sizes"])
def test_layer_norm_add_moves_rows_and_codes(kernels, adds, moves):
    generator = np.random.default_rng(0)
    x, gamma, beta = floats(generator, 6, 35, 40), floats(generator, 40), floats(generator, 40)
    residual = floats(generator, 2, 3, 5, 7, 40) if adds else None
    rows = None if moves == "codes" else generator.permutation(35)
    code_rows = None if moves == "rows" else generator.permutation(14 if "other" in moves else 35)
    total, actual = kernels.layer_norm_add(
        x, gamma, beta, 1e-6, residual=residual, rows=rows, quantizer=UNIFORM, code_rows=code_rows
    )
    normal = kernels.layer_norm_add(x, gamma, beta, 1e-6)
    moved = ops.take_rows(normal, rows)
    assert np.array_equal(total, moved if residual is None else moved.reshape(residual.shape) + residual)
    assert np.array_equal(actual, ops.take_rows(ops.quantize_codes(UNIFORM, total), code_rows))


def test_layer_norm_add_refuses_tables_that_do_not_divide_its_rows(kernels):
    x, table = np.zeros(10, np.float32), np.arange(5)
    floats_at, table_at = x.ctypes.data, table.ctypes.data
    for size, code_size, tasks in ((5, 2, 1), (3, 2, 0), (5, 3, 0), (-5, 2, 0)):
        output = (None, floats_at, None)
        arguments = LayerNormAdd(10, 1, *[floats_at] * 3, 1e-6, size, table_at, *output, code_size, table_at, None)
        assert kernels.tasks("layer_norm_add", arguments) == tasks
        assert (kernels.run_task("layer_norm_add", arguments, 0) == OK) == (tasks > 0)


LINEAR_SHAPES = [
    (0, 8, 8), (1, 1, 1), (5, 3, 0), (2, 0, 5), (1, 4, 16), (7, 5, 17), (6, 19, 64), (13, 66, 65), (129, 35, 48),
    (3, 111, 130), (197, 64, 100), (33, 192, 16), (45, 197, 80), (16, 130, 33), (290, 70, 97), (400, 20, 40),
]  # fmt: skip


@pytest.mark.parametrize("quantizer", [None, *QUANTIZERS])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), LINEAR_SHAPES)
def test_linear_equals_the_reference_bit_for_bit(kernels, quantizer, rows, inputs, outputs):
    generator = np.random.default_rng(rows + inputs + outputs)
    a, weight = codes(generator, rows, inputs), codes(generator, inputs, outputs).view(np.int8)
    scale, bias = np.abs(floats(generator, outputs)) * 2e-3, floats(generator, outputs)
    arguments = {"input_scale": 0.17, "input_zero_point": 201}
    expected = ops.linear(a, weight, scale, bias, **arguments)
    if quantizer is not None:
        expected = ops.quantize_codes(quantizer, expected)
    for by_rows in (False, True):
        actual = kernels.linear(a, weight, scale, bias, quantizer=quantizer, by_rows=by_rows, **arguments)
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_linear_adds_the_residual_at_the_row_it_writes(kernels, activation):
    generator = np.random.default_rng(1)
    a, weight = codes(generator, 8, 12, 30), codes(generator, 30, 37).view(np.int8)
    scale, bias, residual = np.full(37, 1e-3, np.float32), floats(generator, 37), floats(generator, 4, 2, 12, 37)
    rows = generator.permutation(24)
    arguments = {
        "input_scale": 0.1, "input_zero_point": 128, "activation": activation, "residual": residual, "rows": rows
    }  # fmt: skip
    actual = kernels.linear(a, weight, scale, bias, **arguments)
    expected = ops.linear(a, weight, scale, bias, **arguments)
    if activation == "none":
        assert np.array_equal(actual, expected)
    else:
        assert np.abs(actual - expected).max() < ops.activation_tolerance(activation) * (np.abs(expected).max() + 4)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 5, 3), (37, 64, 96), (197, 30, 200), (300, 70, 65)])
def test_a_linears_output_may_take_the_residuals_place(kernels, activation, moves, rows, inputs, outputs):
    generator = np.random.default_rng(rows)
    a, weight = codes(generator, rows, inputs), codes(generator, inputs, outputs).view(np.int8)
    constants = (np.full(outputs, 1e-3, np.float32), floats(generator, outputs))
    arguments = {
        "input_scale": 0.1, "input_zero_point": 128, "activation": activation,
        "residual": floats(generator, rows, outputs), "rows": generator.permutation(rows) if moves else None,
    }  # fmt: skip
    expected = kernels.linear(a, weight, *constants, **arguments)
    for by_rows in (False, True):
        assert np.array_equal(
            kernels.linear(a, weight, *constants, **arguments, by_rows=by_rows, in_place=True), expected
        )


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("largest", [1e-3, 1e3, 1e30])
def test_outputs_far_beyond_the_codes_are_the_last(kernels, quantizer, largest):
    """Steps that do not fit 32 bits among them."""
    generator = np.random.default_rng(4)
    a, weight = codes(generator, 40, 24), codes(generator, 24, 70).view(np.int8)
    scale, bias = np.full(70, largest, np.float32), floats(generator, 70) * np.float32(largest)
    bias[::7] *= 1e-30
    arguments = {"input_scale": 0.1, "input_zero_point": 128}
    expected = ops.quantize_codes(quantizer, ops.linear(a, weight, scale, bias, **arguments))
    assert np.array_equal(kernels.linear(a, weight, scale, bias, quantizer=quantizer, **arguments), expected)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_linear_multiplies_its_outputs_before_it_quantizes_them(kernels, quantizer):
    generator = np.random.default_rng(4)
    a, weight = codes(generator, 9, 12), codes(generator, 12, 77).view(np.int8)
    scale, bias = np.full(77, 1e-3, np.float32), floats(generator, 77)
    arguments = {"input_scale": 0.1, "input_zero_point": 128, "multiplier": np.exp(floats(generator, 77))}
    expected = ops.quantize_codes(quantizer, ops.linear(a, weight, scale, bias, **arguments))
    assert np.array_equal(kernels.linear(a, weight, scale, bias, quantizer=quantizer, **arguments), expected)


@pytest.mark.parametrize("quantizer", [None, *QUANTIZERS])
@pytest.mark.parametrize("after", [(), ("multiplier",), ("residual",)])
def test_linear_multiplies_by_a_factor_before_it_quantizes(kernels, quantizer, after):
    generator = np.random.default_rng(6)
    a, weight = codes(generator, 3, 9, 12), codes(generator, 12, 77).view(np.int8)
    scale, bias = np.full(77, 1e-3, np.float32), floats(generator, 77)
    also = {"multiplier": np.exp(floats(generator, 77)), "residual": floats(generator, 3, 9, 77)}
    arguments = {"input_scale": 0.1, "input_zero_point": 128, "factor": floats(generator, 3, 9, 77)}
    arguments |= {name: also[name] for name in after}
    expected = ops.linear(a, weight, scale, bias, **arguments)
    if quantizer is not None:
        expected = ops.quantize_codes(quantizer, expected)
    assert np.array_equal(kernels.linear(a, weight, scale, bias, quantizer=quantizer, **arguments), expected)


@pytest.mark.parametrize("quantizer", [None, *QUANTIZERS])
@pytest.mark.parametrize(
    ("tokens", "outputs", "tables"),
    [(1, 64, (1, 64)), (5, 192, (1, 64)), (7, 96, (2, 32)), (3, 48, (4, 16)), (2, 10, (32, 2)), (4, 128, (2, 64))],
)
def test_linear_rotates_heads_before_it_quantizes_them(kernels, quantizer, tokens, outputs, tables):
    generator = np.random.default_rng(outputs)
    a, weight = codes(generator, 3, tokens, 21), codes(generator, 21, outputs).view(np.int8)
    scale, bias = np.full(outputs, 1e-3, np.float32), floats(generator, outputs)
    rotary = (floats(generator, tokens, *tables), floats(generator, tokens, *tables))
    arguments = {"input_scale": 0.1, "input_zero_point": 128, "rotary": rotary}
    expected = ops.linear(a, weight, scale, bias, **arguments)
    if quantizer is not None:
        expected = ops.quantize_codes(quantizer, expected)
    assert np.array_equal(kernels.linear(a, weight, scale, bias, quantizer=quantizer, **arguments), expected)


@pytest.mark.parametrize("quantizer", [None, *QUANTIZERS])
@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize(("width", "outputs"), [(16, 16), (16, 112), (32, 32), (32, 160), (64, 64), (64, 192)])
def test_linear_brings_heads_to_length_1(kernels, kernels_of, quantizer, multiplied, width, outputs):
    generator = np.random.default_rng(outputs)
    a, weight = codes(generator, 3, 7, 21), codes(generator, 21, outputs).view(np.int8)
    bias = floats(generator, outputs)
    a[0, 0], bias[:width] = 128, 0  # a head of length 0, and some shorter than epsilon
    scale = np.repeat(np.float32([1e-3, 1e-9] * outputs)[: outputs // width], width)
    arguments = {"input_scale": 0.1, "input_zero_point": 128, "unit_heads": (width, 1e-5)}
    arguments["multiplier"] = np.exp(floats(generator, outputs)) if multiplied else None
    actual = kernels.linear(a, weight, scale, bias, quantizer=quantizer, **arguments)
    portable = kernels_of("portable").linear(a, weight, scale, bias, quantizer=quantizer, **arguments)
    assert np.array_equal(actual, portable)
    expected = ops.linear(a, weight, scale, bias, **arguments)
    assert not expected[0, 0, :width].any()
    if quantizer is None:
        assert (np.abs(actual - expected) <= ops.UNIT_HEADS_TOLERANCE * np.abs(expected)).all()
    else:
        assert_codes_of(actual, quantizer, expected, ops.UNIT_HEADS_TOLERANCE * np.abs(expected))


@pytest.mark.parametrize("extreme", [0, 255])
def test_linear_sums_extreme_codes_exactly(kernels, extreme):
    a, weight = np.full((7, 300), extreme, np.uint8), np.tile(np.array([-128, 127], np.int8), (300, 10))
    ones, zeros = np.ones(20, np.float32), np.zeros(20, np.float32)
    arguments = {"input_scale": 1.0, "input_zero_point": 255 - extreme}
    expected = ops.linear(a, weight, ones, zeros, **arguments)
    assert np.abs(expected).min() == 300 * 127 * 255
    assert np.array_equal(kernels.linear(a, weight, ones, zeros, **arguments), expected)


@pytest.mark.parametrize("largest", [1, 2, 4, 5, 8, 15, 16, 17, 21, 32, 63, 64, 65])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3, 5), (5, 8, 16), (6, 131, 33), (13, 530, 70)])
def test_linear_of_small_weights_is_exact_at_their_limit(kernels, largest, rows, inputs, outputs):
    generator = np.random.default_rng(largest)
    a = generator.choice(np.array([0, 254, 255], np.uint8), (rows, inputs), p=[0.01, 0.01, 0.98])
    weight = np.full((inputs, outputs), -largest, np.int8)
    weight[:, 1::2] = np.abs(weight[:, 1::2])
    weight[:, 2::3] = generator.integers(-largest, largest + 1, weight[:, 2::3].shape)
    ones, zeros = np.ones(outputs, np.float32), np.zeros(outputs, np.float32)
    expected = ops.linear(a, weight, ones, zeros, input_scale=1.0, input_zero_point=3)
    for weight_is_known in (False, True):
        actual = kernels.linear(
            a, weight, ones, zeros, input_scale=1.0, input_zero_point=3, weight_is_known=weight_is_known
        )
        assert np.array_equal(actual, expected)


SPANS = (16, 8, 6, 4, 3, 2, 1)


def longest_span(weight):
    groups = weight.shape[0] // 4
    pairs = weight[: 4 * groups].astype(int).reshape(groups, 2, 2, -1)
    sums = np.stack([np.maximum(pairs, 0).sum(2), np.maximum(-pairs, 0).sum(2)])

    def fits(span):
        starts = [*range(0, groups - groups % span, span), *range(groups - groups % span, groups)]
        return np.add.reduceat(sums, starts, axis=1).max() * 255 < 2**15

    return next((span for span in SPANS if fits(span)), 0)


@pytest.mark.parametrize("size", [4, 8, 16, 32, 64, 127])
def test_span_is_the_longest_that_fits(kernels, size):
    generator = np.random.default_rng(size)
    for spread in (size / 12, size / 6, size / 3):
        weight = np.clip(np.rint(generator.normal(0, spread, (4 * 41, 23))), -size, size).astype(np.int8)
        assert kernels.span(weight) == longest_span(weight)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 200), (5, 131), (8, 64)])
def test_sums_of_a_span_may_fill_16_bits(kernels, span, rows, inputs):
    """255 * 128 still fits: 64 in the first and in the last group of each span, -64 for other inputs and outputs."""
    weight = np.zeros((inputs, 37), np.int8)
    for first in range(0, inputs - 4 * span + 1, 4 * span):
        last = first + 4 * span - 4
        weight[[first, last + 1], ::2] = 64
        weight[[first + 2, last + 3], 1::3] = -64
    a = np.full((rows, inputs), 255, np.uint8)
    a[:, 7] = 3
    ones, zeros = np.ones(37, np.float32), np.zeros(37, np.float32)
    for extra in (0, 1):
        weight[0, 4] = 64 + extra
        assert kernels.span(weight) == (span if extra == 0 else longest_span(weight)) and longest_span(weight) <= span
        actual = kernels.linear(a, weight, ones, zeros, input_scale=1.0, input_zero_point=0)
        assert np.array_equal(actual, a.astype(np.float32) @ weight.astype(np.float32))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS[1:])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_linear_with_gelu(kernels, kernels_of, quantizer, activation):
    generator = np.random.default_rng(2)
    a, weight = codes(generator, 31, 40), codes(generator, 40, 77).view(np.int8)
    scale, bias = np.full(77, 1.5e-4, np.float32), floats(generator, 77) * 2
    arguments = {"input_scale": 0.9, "input_zero_point": 128, "activation": activation}
    actual = kernels.linear(a, weight, scale, bias, quantizer=quantizer, **arguments)
    portable = kernels_of("portable").linear(a, weight, scale, bias, quantizer=quantizer, **arguments)
    assert np.array_equal(actual, portable)
    x = ops.linear(a, weight, scale, bias, **(arguments | {"activation": "none"}))
    tolerance = ops.activation_tolerance(activation) * np.maximum(1, np.abs(x))
    assert_codes_of(actual, quantizer, ops.activate(x, activation), tolerance)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS[1:])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_multipliers_behind_gelu_may_be_anything(kernels, kernels_of, quantizer, activation):
    """Of either sign, and so large that its lowest outputs are beyond all steps."""
    generator = np.random.default_rng(5)
    a, weight = codes(generator, 37, 20), codes(generator, 20, 200).view(np.int8)
    scale, bias = np.full(200, 2e-4, np.float32), floats(generator, 200)
    multiplier = np.exp(floats(generator, 200)).astype(np.float32)
    multiplier[[3, 64 + 5, 64 + 6, 128 + 7]] = -2, 1e9, -1e9, 1e30
    arguments = {"input_scale": 0.9, "input_zero_point": 128, "activation": activation, "multiplier": multiplier}
    portable = kernels_of("portable").linear(a, weight, scale, bias, quantizer=quantizer, **arguments)
    for by_rows in (False, True):
        actual = kernels.linear(a, weight, scale, bias, quantizer=quantizer, by_rows=by_rows, **arguments)
        assert np.array_equal(actual, portable)
    x = ops.linear(a, weight, scale, bias, input_scale=0.9, input_zero_point=128)
    tolerance = ops.activation_tolerance(activation) * np.maximum(1, np.abs(x)) * np.abs(multiplier)
    assert_codes_of(actual, quantizer, ops.activate(x, activation) * multiplier, tolerance)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS[1:])
def test_gelu_is_within_its_tolerance(kernels, kernels_of, activation):
    x = np.concatenate([np.linspace(-12, 12, 100_003), [0, -0.0, 1e-30, 200, -200]]).astype(np.float32)
    one = {"input_scale": 1.0, "input_zero_point": 0, "activation": activation}
    empty, no_weight = np.zeros((1, 0), np.uint8), np.zeros((0, x.size), np.int8)
    actual = kernels.linear(empty, no_weight, np.ones_like(x), x, **one)[0]
    assert np.array_equal(actual, kernels_of("portable").linear(empty, no_weight, np.ones_like(x), x, **one)[0])
    error = np.abs(actual - ops.activate(x, activation)) / np.maximum(1, np.abs(x))
    assert error.max() < ops.activation_tolerance(activation)


def quantized(kernels, quantizer, x):
    """The product is 0, so that the bias is quantized."""
    empty, no_weight = np.zeros((1, 0), np.uint8), np.zeros((0, x.size), np.int8)
    return kernels.linear(
        empty, no_weight, np.ones_like(x), x, input_scale=1.0, input_zero_point=0, quantizer=quantizer
    )[0]


def hardest_divisions():
    """X < Y of 24 bits whose quotient lies nearest to the middle of two floats, one of them, but for a power of 2,
    a half or a whole number below 512."""
    for odd in range(1, 1024, 2):
        number = odd << (25 - odd.bit_length())
        for middle in (number - 1 if odd > 1 else 2**25 - 1, number + 1):
            for rest in (1, -1):
                y = -rest * pow(middle, -1, 2**25) % 2**25
                x, none = divmod(middle * y + rest, 2**25)
                if none == 0 and 2**23 <= x < y < 2**24:
                    yield odd, x, y


def test_hardest_divisions(kernels):
    found = list(hardest_divisions())
    assert found
    for odd, x, y in found:
        for exponent in range(odd.bit_length() - 2, 9):  # of the quotient
            quantizer = ops.CodeQuantizer(scale=y * 2.0**-30, zero_point=0, minimum=0, maximum=255)
            floats = np.array([(x + i) * 2.0 ** (exponent - 30) for i in (-1, 0, 1)], np.float32)
            assert np.array_equal(quantized(kernels, quantizer, floats), ops.quantize_codes(quantizer, floats))


def test_ties_of_many_scales(kernels):
    generator = np.random.default_rng(0)
    ties = np.arange(-255, 511).astype(np.float32) / 2
    for scale in np.exp(generator.uniform(-20, 20, 200)).astype(np.float32):
        quantizer = ops.CodeQuantizer(scale=float(scale), zero_point=100, minimum=3, maximum=250)
        x = ties * scale
        x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
        assert np.array_equal(quantized(kernels, quantizer, x), ops.quantize_codes(quantizer, x))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizer_rounds_as_a_division_does(kernels, quantizer):
    """Ties, their neighbours, codes beyond either end, infinities: the product is 0, so that the bias is quantized."""
    steps = np.arange(-1200, 1200).astype(np.float32) * np.float32(quantizer.scale) / 4
    edges = np.array([0, -0.0, np.inf, -np.inf, 3e38, -3e38, 1e-40, -1e-40], np.float32)
    x = np.concatenate([steps, np.nextafter(steps, np.float32(9)), np.nextafter(steps, np.float32(-9)), edges])
    random = np.random.default_rng(3).standard_normal(50_000).astype(np.float32) * 5
    x = np.concatenate([x, random])
    with np.errstate(over="ignore"):
        expected = ops.quantize_codes(quantizer, x)
    assert np.array_equal(quantized(kernels, quantizer, x), expected)


ATTENTION_SHAPES = [
    # batch, heads, rows, columns, width, value width
    (0, 2, 3, 3, 8, 8), (2, 1, 1, 1, 1, 1), (1, 3, 5, 7, 6, 18), (2, 2, 17, 17, 32, 32), (1, 2, 131, 66, 33, 65),
    (1, 1, 6, 65, 64, 64), (1, 3, 1, 197, 64, 16), (1, 1, 18, 40, 70, 24), (1, 2, 0, 5, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize("p_quantizer", PROBABILITIES)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("added", ["nothing", "bias", "bias and mask", "row of mask"])
@pytest.mark.parametrize("row_scale", [False, True])
def test_attention(kernels, kernels_of, shape, p_quantizer, added, row_scale):
    batch, heads, rows, columns, width, value_width = shape
    generator = np.random.default_rng(columns)
    q, k = codes(generator, batch, rows, heads * width), codes(generator, batch, columns, heads * width)
    v = codes(generator, batch, columns, heads * value_width)
    bias = floats(generator, 1, heads, rows, columns) if added.startswith("bias") else None
    mask = np.where(generator.random((max(batch, 1), 1, rows, columns)) < 0.2, -100, 0).astype(np.float32)
    if added == "row of mask":
        mask = np.where(generator.random((1, 1, 1, columns)) < 0.2, -np.inf, 0).astype(np.float32)
        mask[..., 0] = 0
    elif added != "bias and mask":
        mask = None
    arguments = (q, k, v, heads, SCALES, p_quantizer, bias, mask)
    actual = kernels.attention(*arguments, row_scale=row_scale)
    assert np.array_equal(actual, kernels_of("portable").attention(*arguments, row_scale=row_scale))
    assert np.array_equal(actual, kernels.attention(*arguments, row_scale=row_scale, by_heads=True))
    output = ops.CodeQuantizer(0.05, 128)
    quantized = kernels.attention(*arguments, quantizer=output, row_scale=row_scale)
    assert np.array_equal(quantized, ops.quantize_codes(output, actual))
    if not actual.size:
        return
    p = ops.attention_probabilities(q, k, heads, SCALES, bias, mask)
    if row_scale:
        p, largest = ops.scale_rows(p)
        by_row = ops.by_context(largest, v.shape[2])
        assert_context_of(actual, p, v, p_quantizer, by_row)
    else:
        assert_context_of(actual, p, v, p_quantizer)


@pytest.mark.parametrize("largest", [1, 4, 5, 8, 9, 10, 11, 16, 17, 21, 22, 32, 33, 63, 64, 65, 127])
@pytest.mark.parametrize("shape", [(1, 3, 7, 5, 6, 18), (2, 2, 17, 17, 40, 32), (1, 1, 131, 66, 33, 65)])
def test_attention_of_small_keys_and_values_is_exact_at_their_limit(kernels, kernels_of, shape, largest):
    """Codes that lie `largest` from 128 at most, most of them just there; queries and codes of P are large."""
    batch, heads, rows, columns, width, value_width = shape
    generator = np.random.default_rng(largest)
    q = generator.choice(np.array([0, 254, 255], np.uint8), (batch, rows, heads * width), p=[0.01, 0.01, 0.98])
    k, v = (
        generator.choice(np.array([128 - largest, 128, 128 + largest], np.uint8), (batch, columns, heads * each))
        for each in (width, value_width)
    )
    k[:, 0], k[:, 1], v[..., ::2], v[..., 1::5] = 128 - largest, 128 + largest, 128 - largest, 128 + largest
    scales = replace(SCALES, k_scale=SCALES.k_scale / largest)
    for keys in (k, np.full_like(k, 128 + largest)):  # equal scores give a P of 255 alone where rows are scaled
        arguments = (q, keys, v, heads, scales, PROBABILITIES[0])
        for row_scale in (False, True):
            actual = kernels.attention(*arguments, row_scale=row_scale)
            assert np.array_equal(actual, kernels_of("portable").attention(*arguments, row_scale=row_scale))


@pytest.mark.parametrize(("batch", "rows"), [(1, 3), (7, 13), (5, 49), (3, 64)])
def test_windows_of_a_task_may_differ(kernels, kernels_of, batch, rows):
    """Small ones share a task. Keys and values of the first are small, those of others are not."""
    generator = np.random.default_rng(rows)
    q, k, v = (codes(generator, batch, rows, 3 * 32) for _ in "qkv")
    k[0], v[0] = 128 + k[0] % 4, 128 + v[0] % 4
    bias, mask = floats(generator, 1, 3, rows, rows), floats(generator, batch, 1, rows, rows)
    for added in ((None, None), (bias, mask)):
        arguments = (q, k, v, 3, SCALES, PROBABILITIES[0], *added)
        actual = kernels.attention(*arguments, row_scale=True)
        assert np.array_equal(actual, kernels_of("portable").attention(*arguments, row_scale=True))
        for window in range(batch):
            of_window = (each[[window]] for each in (q, k, v))
            added_to_it = (added[0], None if added[1] is None else mask[[window]])
            alone = kernels.attention(*of_window, 3, SCALES, PROBABILITIES[0], *added_to_it, row_scale=True)
            assert np.array_equal(actual[[window]], alone)


@pytest.mark.parametrize("columns", [5, 16, 63, 70])
@pytest.mark.parametrize("row_scale", [False, True])
def test_scores_below_those_of_no_key(kernels, columns, row_scale):
    """Where all keys are far from their zero point, scores are lower than beside the last key, where codes count as
    that."""
    generator = np.random.default_rng(columns)
    q, k = (generator.integers(200, 256, (1, 4, 2 * 24)).astype(np.uint8), codes(generator, 1, columns, 2 * 24) // 4)
    v = codes(generator, 1, columns, 2 * 24)
    scales = replace(SCALES, q_zero_point=10, k_zero_point=200)
    p = ops.attention_probabilities(q, k, 2, scales, None, None)
    p, largest = ops.scale_rows(p) if row_scale else (p, None)
    expected = ops.attention_context(ops.quantize_codes(PROBABILITIES[0], p), PROBABILITIES[0], v, scales, largest)
    actual = kernels.attention(q, k, v, 2, scales, PROBABILITIES[0], row_scale=row_scale)
    assert np.abs(actual - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("q_scale", [1e-15, 1e-9, 1e-6])
@pytest.mark.parametrize("columns", [5, 63, 70])
@pytest.mark.parametrize("row_scale", [False, True])
def test_no_key_counts_where_scores_hardly_differ(kernels, q_scale, columns, row_scale):
    generator = np.random.default_rng(columns)
    q, k, v = codes(generator, 1, 4, 2 * 24), codes(generator, 1, columns, 2 * 24), codes(generator, 1, columns, 2 * 24)
    scales = replace(SCALES, q_scale=q_scale)
    probability = ops.CodeQuantizer(0.25 / columns, 0)
    p = ops.attention_probabilities(q, k, 2, scales, None, None)
    p, largest = ops.scale_rows(p) if row_scale else (p, None)
    expected = ops.attention_context(ops.quantize_codes(probability, p), probability, v, scales, largest)
    actual = kernels.attention(q, k, v, 2, scales, probability, row_scale=row_scale)
    assert np.abs(actual - expected).max() <= 0.002 * np.abs(expected).max()


@pytest.mark.parametrize("shift", [-3.4028235e38, -1e9, -3e4, 7e4, 1e9])
@pytest.mark.parametrize("row_scale", [False, True])
def test_attention_of_rows_whose_scores_are_all_far_off(kernels, shift, row_scale):
    """As a mask of a whole row makes them: what is left of the scores' differences counts."""
    generator = np.random.default_rng(6)
    q, k, v = (codes(generator, 1, 7, 2 * 24) for _ in "qkv")
    mask = np.full((1, 1, 7, 7), shift, np.float32)
    mask[..., 3:] -= 2
    actual = kernels.attention(q, k, v, 2, SCALES, PROBABILITIES[0], None, mask, row_scale=row_scale)
    p = ops.attention_probabilities(q, k, 2, SCALES, None, mask)
    p, largest = ops.scale_rows(p) if row_scale else (p, None)
    p_codes = ops.quantize_codes(PROBABILITIES[0], p)
    expected = ops.attention_context(p_codes, PROBABILITIES[0], v, SCALES, largest)
    assert np.abs(actual - expected).max() <= 0.02 * np.abs(expected).max()


def assert_context_of(actual, p, v, p_quantizer, by_row=None):
    """Rows whose codes of P are beyond doubt are equal, bit for bit if no `by_row` multiplies them; a doubtful code may
    be the next one."""
    slack = ops.SOFTMAX_TOLERANCE * np.maximum(p, 2.0**-20)
    low = ops.quantize_codes(p_quantizer, (p - slack).astype(np.float32))
    high = ops.quantize_codes(p_quantizer, (p + slack).astype(np.float32))
    expected = ops.attention_context(low, p_quantizer, v, SCALES)
    doubt = (high.astype(int) - low).sum(-1).max(1)  # [B, T], over heads
    step = np.full_like(expected, p_quantizer.scale * SCALES.v_scale * 255)
    allowed = np.zeros_like(expected)
    if by_row is not None:
        expected, step = expected * by_row, step * by_row
        allowed = np.abs(expected) * np.float32(ops.SOFTMAX_TOLERANCE)
    assert (np.abs(actual - expected)[doubt == 0] <= allowed[doubt == 0]).all()
    assert doubt.size < 20 or (doubt == 0).mean() > 0.8
    assert (np.abs(actual - expected) <= allowed + doubt[..., None] * step * 1.001).all()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 8, 8, 4, 4), (1, 1, 1, 1, 1, 1), (2, 3, 14, 51, 7, 17), (1, 3, 32, 48, 16, 16)]
)
def test_patches(kernels, quantizer, shape):
    *image, patch_height, patch_width = shape
    x = floats(np.random.default_rng(5), *image) * 3
    expected = ops.quantize_codes(quantizer, ops.patches(x, patch_height, patch_width))
    assert np.array_equal(kernels.patches(x, patch_height, patch_width, quantizer), expected)


def test_every_instruction_set_of_the_processor_is_found(library):
    from mptqc.runtime.library import available_isas
    from mptqc.runtime.machine import cpu_features, cpu_info

    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the names are those of x86-64")
    features = cpu_features(cpu_info()) or {}
    names = [name for name in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8") if features.get(name)]
    assert available_isas(library) == ["portable", *names]


@pytest.mark.parametrize("name", ["avx1024", "AVX2"])
def test_an_unknown_instruction_set_is_refused(library, name):
    assert library.mptqc_choose_isa(name.encode(), ctypes.byref(ctypes.c_int())) != 0
