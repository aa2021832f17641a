"""The operators' numpy meaning agrees with what the portable file computes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantizers import FOUR_REGIONS, THREE_REGIONS, opt_m

from mptqc.plan import ActivationQuantizer, Uniform
from mptqc.reference import custom_ops as ops
from mptqc.reference.quantizers import integer_linear, quantize

SCALES = ops.AttentionScales(0.02, 120, 0.03, 131, 0.01, 128)
QUANTIZERS = [
    Uniform(bits=8, scale=0.03, zero_point=17),
    Uniform(bits=3, scale=0.4, zero_point=2),
    opt_m(bits=4, scale=0.1, zero_point=1, m=2, low_codes=10),
    opt_m(bits=7, scale=0.02, zero_point=0, m=1, low_codes=65),
    THREE_REGIONS,
    FOUR_REGIONS,
]


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def codes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_are_those_of_the_plans_quantizer(quantizer: ActivationQuantizer) -> None:
    x = np.concatenate([floats(4001) * 4, np.arange(-600, 600).astype(np.float32) * np.float32(quantizer.scale / 2)])
    assert np.array_equal(ops.quantize_codes(ops.code_quantizer(quantizer), x), quantize(quantizer, x))


def test_a_shifted_container_shifts_the_codes() -> None:
    x = floats(500) * 3
    narrow = ops.CodeQuantizer(0.3, 3, 0, 15)
    shifted = ops.CodeQuantizer(0.3, 3 + 240, 240, 255)
    assert np.array_equal(ops.quantize_codes(narrow, x) + 240, ops.quantize_codes(shifted, x))


@given(st.integers(0, 21), st.integers(0, 37))
def test_unblock_restores_a_blocked_weight(inputs: int, outputs: int) -> None:
    weight = codes(inputs, outputs).view(np.int8)
    assert np.array_equal(ops.unblock_weight(ops.block_weight(weight), inputs, outputs), weight)


def test_a_block_holds_sixteen_outputs_of_four_inputs() -> None:
    weight = codes(10, 20).view(np.int8)
    blocks = ops.block_weight(weight)
    assert blocks.shape == (2, 3, 16, 4)
    assert blocks[1, 2, 3, 1] == weight[4 * 2 + 1, 16 + 3]
    assert not blocks[1, :, 4:].any() and not blocks[:, 2, :, 2:].any()


def test_linear_equals_the_integer_linear() -> None:
    quantizer = Uniform(bits=8, scale=0.03, zero_point=128)
    x, weight, scale, bias = floats(5, 37), codes(37, 11).view(np.int8), np.abs(floats(11)) + 0.01, floats(11)
    a = ops.quantize_codes(ops.code_quantizer(quantizer), x)
    y = ops.linear(a, weight, scale, bias, input_scale=0.03, input_zero_point=128)
    assert np.array_equal(y, integer_linear(quantizer, x, weight, scale, bias))


def test_rows_of_a_norm_and_a_linear_undo_each_other() -> None:
    rows = np.random.default_rng(1).permutation(6)
    x, residual = floats(2, 6, 8), floats(2, 2, 3, 8, seed=2)
    moved = ops.layer_norm(x, np.ones(8, np.float32), np.zeros(8, np.float32), 1e-6, rows)
    straight = ops.layer_norm(x, np.ones(8, np.float32), np.zeros(8, np.float32), 1e-6)
    assert np.array_equal(moved[1, 2], straight[1, rows[2]])
    quantizer = ops.CodeQuantizer(0.05, 128)
    weight, ones = codes(8, 8).view(np.int8), np.ones(8, np.float32)

    def product(y: np.ndarray, table: np.ndarray | None) -> np.ndarray:
        a = ops.quantize_codes(quantizer, y)
        return ops.linear(a, weight, ones, ones, input_scale=0.05, input_zero_point=128, residual=residual, rows=table)

    assert np.array_equal(product(moved, rows), product(straight, None))
    assert product(moved, rows).shape == residual.shape


def test_a_norm_is_added_to_the_row_that_it_makes() -> None:
    rows = np.random.default_rng(1).permutation(6)
    x, residual, ones, zeros = (
        floats(2, 6, 8),
        floats(2, 2, 3, 8, seed=2),
        np.ones(8, np.float32),
        np.zeros(8, np.float32),
    )
    total = ops.layer_norm(x, ones, zeros, 1e-6, rows, residual)
    straight = ops.layer_norm(x, ones, zeros, 1e-6)
    assert total.shape == residual.shape
    assert np.array_equal(total[1, 1, 2], residual[1, 1, 2] + straight[1, rows[5]])
    assert np.array_equal(ops.take_rows(total, np.array([2, 0, 1]))[0, 1], total[0, 1, [2, 0, 1]])


def test_gelu_is_exact_at_known_points() -> None:
    x = np.array([0, 1, -1, 40, -40], np.float32)
    assert np.allclose(ops.gelu(x), [0, 0.8413447, -0.1586553, 40, 0], rtol=1e-6, atol=0)


def test_attention_is_that_of_the_dequantized_operands() -> None:
    batch, rows, columns, heads, width = 4, 3, 5, 2, 6
    q, k, v = (codes(batch, size, heads * width, seed=size) for size in (rows, columns, columns))
    bias, mask = floats(1, heads, rows, columns), floats(2, 1, 1, columns)
    p = ops.attention_probabilities(q, k, heads, SCALES, bias, mask)
    p_quantizer = ops.CodeQuantizer(1 / 255, 0)
    context = ops.attention_context(ops.quantize_codes(p_quantizer, p), p_quantizer, v, SCALES)
    assert context.shape == (batch, rows, heads * width)

    def head(x: np.ndarray, zero_point: int, scale: float) -> np.ndarray:
        return (x[3, :, width : 2 * width].astype(np.float64) - zero_point) * scale

    scores = head(q, 120, 0.02) @ head(k, 131, 0.03).T + bias[0, 1] + mask[1, 0]
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert np.allclose(p[3, 1], expected, rtol=1e-4)
    half_a_step = columns * 0.5 / 255 * 128 * 0.01
    assert np.abs(context[3, :, width:] - expected @ head(v, 128, 0.01)).max() <= half_a_step


def test_patches_are_disjoint_squares_of_all_channels() -> None:
    x = floats(2, 3, 4, 6)
    y = ops.patches(x, 2, 3)
    assert y.shape == (2, 2, 2, 18)
    assert np.array_equal(y[1, 0, 1].reshape(3, 2, 3), x[1, :, 0:2, 3:6])
