import numpy as np
import pytest

from mptqc.reference import custom_ops as ops
from mptqc.reference.custom_op_bounds import output_bounds, quantizer_of

random = np.random.default_rng(3)
OUTPUT = ops.CodeQuantizer(0.05, 120)
P = ops.CodeQuantizer(0.004, 3, 1, 3 + 16 + 4 * 50, (2,), (16,))
SCALES = ops.AttentionScales(0.021, 117, 0.019, 133, 0.013, 126)
X = random.standard_normal((2, 6, 20)).astype(np.float32)
GAMMA, BETA = random.standard_normal((2, 20)).astype(np.float32)
A = random.integers(0, 256, (2, 6, 20), np.uint8)
W = random.integers(-128, 128, (20, 24)).astype(np.int8)
W_SCALE, BIAS = np.abs(random.standard_normal((2, 24))).astype(np.float32) * np.float32(1e-3)
RESIDUAL = random.standard_normal((3, 4, 24)).astype(np.float32)
ROWS = random.permutation(6)
STREAM = random.standard_normal((2, 3, 2, 20)).astype(np.float32)
SUM = ops.layer_norm(X, GAMMA, BETA, 1e-6, ROWS, STREAM)
Q, K, V = (random.integers(0, 256, (2, size, 24), np.uint8) for size in (5, 9, 9))
MASK = random.standard_normal((2, 1, 5, 9)).astype(np.float32)
LINEAR = {"input_scale": 0.07, "input_zero_point": 99}
LINEAR_INPUTS = (A, ops.block_weight(W), W_SCALE, BIAS)
ATTENTION = {"heads": 3, "row_scale": 0, **vars(SCALES), **P.attributes("p")}
PROBABILITIES = ops.attention_probabilities(Q, K, 3, SCALES, None, MASK)
CONTEXT = ops.attention_context(ops.quantize_codes(P, PROBABILITIES), P, V, SCALES)
CASES = [
    (
        "LayerNormQuantize",
        {"epsilon": 1e-6, **OUTPUT.attributes("output")},
        (X, GAMMA, BETA, ROWS),
        ops.quantize_codes(OUTPUT, ops.layer_norm(X, GAMMA, BETA, 1e-6, ROWS)),
    ),
    ("LayerNormAdd", {"epsilon": 1e-6}, (X, GAMMA, BETA, STREAM), ops.layer_norm(X, GAMMA, BETA, 1e-6, None, STREAM)),
    (
        "LayerNormAddQuantize",
        {"epsilon": 1e-6, **OUTPUT.attributes("output")},
        (X, GAMMA, BETA, STREAM, ROWS, ROWS[::-1]),
        (SUM, ops.take_rows(ops.quantize_codes(OUTPUT, SUM), ROWS[::-1])),
    ),
    (
        "LayerNormAddQuantize",
        {"epsilon": 1e-6, **OUTPUT.attributes("output")},
        (X, GAMMA, BETA),
        (ops.layer_norm(X, GAMMA, BETA, 1e-6), ops.quantize_codes(OUTPUT, ops.layer_norm(X, GAMMA, BETA, 1e-6))),
    ),
    ("Linear", {**LINEAR, "activation": "none"}, LINEAR_INPUTS, ops.linear(A, W, W_SCALE, BIAS, **LINEAR)),
    (
        "Linear",
        {**LINEAR, "activation": "none"},
        (*LINEAR_INPUTS, RESIDUAL, ROWS),
        ops.linear(A, W, W_SCALE, BIAS, **LINEAR, residual=RESIDUAL, rows=ROWS),
    ),
    (
        "Linear",
        {**LINEAR, "activation": "none"},
        (*LINEAR_INPUTS, RESIDUAL.astype(np.float16)),
        (ops.linear(A, W, W_SCALE, BIAS, **LINEAR).reshape(3, 4, 24) + RESIDUAL.astype(np.float16)).astype(np.float16),
    ),
    (
        "LayerNormQuantize",
        {"epsilon": 1e-6, **OUTPUT.attributes("output")},
        (X.astype(np.float16), GAMMA, BETA),
        ops.quantize_codes(OUTPUT, ops.layer_norm(X.astype(np.float16).astype(np.float32), GAMMA, BETA, 1e-6)),
    ),
    (
        "LinearQuantize",
        {**LINEAR, "activation": "gelu", **OUTPUT.attributes("output")},
        LINEAR_INPUTS,
        ops.quantize_codes(OUTPUT, ops.linear(A, W, W_SCALE, BIAS, **LINEAR, activation="gelu")),
    ),
    ("Attention", ATTENTION, (Q, K, V, None, MASK), CONTEXT),
    (
        "AttentionQuantize",
        {**ATTENTION, **OUTPUT.attributes("output")},
        (Q, K, V, None, MASK),
        ops.quantize_codes(OUTPUT, CONTEXT),
    ),
    (
        "QuantizePatches",
        {"patch_height": 3, "patch_width": 5, **OUTPUT.attributes("output")},
        (X[None],),
        ops.quantize_codes(OUTPUT, ops.patches(X[None], 3, 5)),
    ),
]


def outputs_of(expected: np.ndarray | tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return expected if isinstance(expected, tuple) else (expected,)


@pytest.mark.parametrize(("op_type", "attributes", "inputs", "expected"), CASES)
def test_without_slack_the_bounds_are_the_reference(op_type, attributes, inputs, expected):
    for (low, high), output in zip(
        output_bounds(op_type, attributes, inputs, slack=0), outputs_of(expected), strict=True
    ):
        assert np.array_equal(low, output)
        assert np.array_equal(high, output)
        assert low.dtype == high.dtype == output.dtype


@pytest.mark.parametrize(("op_type", "attributes", "inputs", "expected"), CASES)
def test_the_bounds_enclose_the_reference(op_type, attributes, inputs, expected):
    all_bounds, all_wide = (output_bounds(op_type, attributes, inputs, slack=slack) for slack in (1, 2.0**12))
    exact = op_type == "QuantizePatches" or attributes.get("activation") == "none"
    for (low, high), (wide, wider), output in zip(all_bounds, all_wide, outputs_of(expected), strict=True):
        assert ((low <= output) & (output <= high)).all()
        assert ((wide <= low) & (high <= wider)).all()
        assert (wide == wider).all() == exact


def test_a_doubtful_probability_bounds_the_context():
    """Each code of P may be either of two, independently: no choice of them leaves the bounds."""
    slack = 2.0**12
    error = slack * ops.SOFTMAX_TOLERANCE * np.maximum(PROBABILITIES, 2.0**-20)
    ((low, high),) = output_bounds("Attention", ATTENTION, (Q, K, V, None, MASK), slack=slack)
    for seed in range(20):
        signs = np.random.default_rng(seed).choice([-1, 1], PROBABILITIES.shape)
        codes = ops.quantize_codes(P, (PROBABILITIES + signs * error).astype(np.float32))
        context = ops.attention_context(codes, P, V, SCALES)
        assert ((low <= context) & (context <= high)).all()


def test_a_quantizer_is_read_from_its_attributes():
    assert quantizer_of(P.attributes("p"), "p") == P


def test_an_unknown_operator_is_named():
    with pytest.raises(ValueError, match=r"ai\.mptqc has no operator Gelu"):
        output_bounds("Gelu", {}, ())
