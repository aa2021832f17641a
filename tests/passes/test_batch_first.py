"""BatchFirst: Linears of [T, B, C] become Linears of [B, T, C]; values stay, bit for bit."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.graph.edit import constant_of
from mptqc.graph.match import find_linears
from mptqc.passes.base import STAGE_KEY, Stage
from mptqc.passes.batch_first import BatchFirst
from mptqc.passes.infer_shapes import InferShapes

T, C = 5, 4
RANDOM = np.random.default_rng(0)
ARRAYS = {
    "W": RANDOM.normal(size=(C, C)).astype(np.float32),
    "V": RANDOM.normal(size=(C, C)).astype(np.float32),
    "b": RANDOM.normal(size=C).astype(np.float32),
    "gamma": RANDOM.normal(size=C).astype(np.float32),
    "position": RANDOM.normal(size=(T, 1, C)).astype(np.float32),
    "table": RANDOM.normal(size=(1, C)).astype(np.float32),
}
LINEAR = "t = Transpose<perm=[1,0,2]>(x)\nm = MatMul(t, W)\nl = Add(m, b)\n"
SECOND = "m2 = MatMul({0}, V)\nl2 = Add(m2, b)\n"
BACK = "y = Transpose<perm=[1,0,2]>({0})"
WHOLE = LINEAR + SECOND.format("l") + BACK.format("l2")
RESIDUAL = (
    "t = Transpose<perm=[1,0,2]>(x)\np = Add(t, position)\nn = LayerNormalization<axis=-1>(p, gamma, b)\n"
    "m = MatMul(n, W)\nl = Add(m, b)\ng = Gelu(l)\nr = Add(p, g)\n" + SECOND.format("r") + BACK.format("l2")
)
ATTENTION = LINEAR + "s = Softmax<axis=0>(l)\n" + SECOND.format("s") + BACK.format("l2")


@pytest.fixture
def make(smoothed) -> Callable[..., ir.Model]:
    def from_body(body: str, batch: str = "b", output: str = "", **more: np.ndarray) -> ir.Model:
        used = {name: array for name, array in (ARRAYS | more).items() if f"{name})" in body or f"{name}," in body}
        model: ir.Model = smoothed(f"float[{batch},{T},{C}] x", output or f"float[{batch},{T},{C}] y", body, {}, used)
        model.metadata_props[STAGE_KEY] = Stage.RAW
        InferShapes()(model)
        return model

    return from_body


def transposes(model: ir.Model) -> int:
    return sum(node.op_type == "Transpose" for node in model.graph)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (WHOLE, 0),
        (RESIDUAL, 0),
        (ATTENTION, 2),  # what mixes rows keeps its order
        (LINEAR + "s = Relu(l)\nu = Add(s, t)\n" + BACK.format("u"), 0),
        (LINEAR + "u = Mul(l, table)\n" + BACK.format("u"), 0),  # Transpose of two axes is not turned, but goes
    ],
)
def test_rows_are_turned_and_values_stay(make, run_batch, body: str, left: int) -> None:
    model = make(body)
    expected = [run_batch(model, batch) for batch in (1, 3)]
    assert BatchFirst()(model).edits
    for batch, wanted in zip((1, 3), expected, strict=True):
        np.testing.assert_allclose(run_batch(model, batch), wanted, rtol=0, atol=2**-20)
    for linear in find_linears(model):
        assert linear.output.shape is not None
        assert list(linear.output.shape)[1:] == [T, C]
    if "table" not in body:
        assert transposes(model) == left
    assert BatchFirst()(model).edits == 0


def test_an_output_of_the_model_keeps_its_order_and_name(make, run_batch) -> None:
    model = make(LINEAR.replace("l = Add", "y = Add"), output=f"float[{T},b,{C}] y")
    expected = run_batch(model)
    BatchFirst()(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(run_batch(model), expected, rtol=0, atol=2**-20)


@pytest.mark.parametrize("batch", ["1", "3"])
def test_a_fixed_batch_is_a_batch(make, run_batch, batch: str) -> None:
    model = make(WHOLE, batch)
    expected = run_batch(model, int(batch))
    assert BatchFirst()(model).edits
    np.testing.assert_allclose(run_batch(model, int(batch)), expected, rtol=0, atol=2**-20)
    assert transposes(model) == 0


@pytest.mark.parametrize(
    "body",
    [
        "m = MatMul(x, W)\ny = Add(m, b)",  # in order
        "t = Transpose<perm=[1,0,2]>(x)\ns = Softmax<axis=0>(t)\n" + BACK.format("s"),  # no Linear
    ],
)
def test_left_alone(make, body: str) -> None:
    model = make(body)
    text = ir.to_onnx_text(model)
    assert BatchFirst()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_constants_are_turned_with_the_rows(make) -> None:
    model = make(RESIDUAL)
    BatchFirst()(model)
    shapes = [
        constant.shape for value in model.graph.initializers.values() if (constant := constant_of(value)) is not None
    ]
    assert (1, T, C) in shapes


def test_two_outputs_that_are_the_same_stay_two(make, run_batch) -> None:
    body = LINEAR + "y = Transpose<perm=[1,0,2]>(l)\nz = Transpose<perm=[1,0,2]>(l)"
    model = make(body, output=f"float[b,{T},{C}] y, float[b,{T},{C}] z")
    expected = run_batch(model)
    BatchFirst()(model)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    np.testing.assert_allclose(run_batch(model), expected, rtol=0, atol=2**-20)


def test_a_weight_for_each_token_is_no_linear(make) -> None:
    each = np.random.default_rng(2).normal(size=(T, C, C)).astype(np.float32)
    model = make("t = Transpose<perm=[1,0,2]>(x)\nm = MatMul(t, each)\n" + BACK.format("m"), each=each)
    assert BatchFirst()(model).edits == 0
