import re

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.fuse_layer_norm import FuseLayerNorm, find_layer_norms

# One rounding (2⁻²⁴) in each of a dozen steps, none of which cancels on these inputs.
TOLERANCE = 12 * 2**-24

HEADER = "g (float[b,3,4] x) => (float[b,3,4] y)"
CONSTANTS = (
    "float[4] gamma = {1.5,-2,0.25,3}, float[4] beta = {0.5,1,-1,0}, float eps = {0.001}, float two = {2}, "
    "float one = {1}, float half = {0.5}, float minus_half = {-0.5}, int64[1] axes = {-1}, int64[1] last = {2}"
)
MOMENTS = """
  mean = ReduceMean(x, axes)
  d = Sub(x, mean)
  square = Pow(d, two)
  variance = ReduceMean(square, axes)
  shifted = Add(variance, eps)
"""
QUOTIENT = MOMENTS + "  deviation = Sqrt(shifted)\n  n = Div(d, deviation)\n"
AFFINE = "  scaled = Mul(n, gamma)\n  y = Add(scaled, beta)\n"

VARIANTS = {
    "torchscript": QUOTIENT + AFFINE,
    "operands_swapped": MOMENTS.replace("Add(variance, eps)", "Add(eps, variance)")
    + "  deviation = Sqrt(shifted)\n  n = Div(d, deviation)\n  scaled = Mul(gamma, n)\n  y = Add(beta, scaled)\n",
    "positive_axis": QUOTIENT.replace("axes", "last") + AFFINE,
    "square_as_mul": QUOTIENT.replace("Pow(d, two)", "Mul(d, d)") + AFFINE,
    "two_subs": QUOTIENT.replace("Div(d, deviation)", "Div(d_again, deviation)").replace(
        "  n = ", "  d_again = Sub(x, mean)\n  n = "
    )
    + AFFINE,
    "two_means": QUOTIENT.replace("Div(d, deviation)", "Div(d_again, deviation)").replace(
        "  n = ", "  mean_again = ReduceMean(x, axes)\n  d_again = Sub(x, mean_again)\n  n = "
    )
    + AFFINE,
    "reciprocal": MOMENTS + "  deviation = Sqrt(shifted)\n  r = Reciprocal(deviation)\n  n = Mul(d, r)\n" + AFFINE,
    "one_over": MOMENTS + "  deviation = Sqrt(shifted)\n  r = Div(one, deviation)\n  n = Mul(r, d)\n" + AFFINE,
    "power_minus_half": MOMENTS + "  r = Pow(shifted, minus_half)\n  n = Mul(d, r)\n" + AFFINE,
    "power_half": MOMENTS + "  deviation = Pow(shifted, half)\n  n = Div(d, deviation)\n" + AFFINE,
    "keras": MOMENTS
    + """  deviation = Sqrt(shifted)
  r = Reciprocal(deviation)
  gain = Mul(r, gamma)
  product = Mul(x, gain)
  moved = Mul(mean, gain)
  offset = Sub(beta, moved)
  y = Add(product, offset)
""",
    "no_affine": QUOTIENT.replace("n = Div", "y = Div"),
    "gamma_only": QUOTIENT + "  y = Mul(n, gamma)\n",
    "beta_only": QUOTIENT + "  y = Add(n, beta)\n",
}


def graph(body: str, header: str = HEADER) -> str:
    return f"{header} <{CONSTANTS}> {{{body}}}"


def sample(batch: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(2, 3, (batch, 3, 4)).astype(np.float32)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_becomes_one_node(parse, run_model, variant):
    before = parse(graph(VARIANTS[variant]))
    model = parse(graph(VARIANTS[variant]))
    result = FuseLayerNorm()(model)
    assert result.edits == 1
    assert [node.op_type for node in model.graph] == ["LayerNormalization"]
    (wanted,), (got,) = run_model(before, sample()), run_model(model, sample())
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_axes_attribute_of_older_opsets(parse):
    body = VARIANTS["torchscript"].replace("ReduceMean(x, axes)", "ReduceMean<axes=[-1]>(x)")
    model = parse(graph(body.replace("ReduceMean(square, axes)", "ReduceMean<axes=[2]>(square)")), opset=14)
    assert len(list(find_layer_norms(model.graph))) == 1


def test_golden(parse, as_text):
    model = parse(graph(VARIANTS["gamma_only"]))
    FuseLayerNorm()(model)
    assert as_text(model) == GOLDEN


def test_second_run_changes_nothing(parse):
    model = parse(graph(VARIANTS["torchscript"]))
    FuseLayerNorm()(model)
    text = ir.to_onnx_text(model)
    assert FuseLayerNorm()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_several_readers_of_the_result(parse):
    body = VARIANTS["torchscript"].replace("y = Add(scaled", "norm = Add(scaled") + "  y = Mul(norm, norm)\n"
    model = parse(graph(body))
    assert FuseLayerNorm()(model).edits == 1
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "Mul"]


def test_normalized_value_read_twice_keeps_its_muls(parse, run_model):
    body = QUOTIENT + "  a = Mul(n, gamma)\n  c = Mul(n, beta)\n  y = Add(a, c)\n"
    before, model = parse(graph(body)), parse(graph(body))
    FuseLayerNorm()(model)
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "Mul", "Mul", "Add"]
    (wanted,), (got,) = run_model(before, sample()), run_model(model, sample())
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_shared_gamma_serves_both_norms(parse):
    names = "mean|d|square|variance|shifted|deviation|n|scaled|y"
    second = re.sub(rf"\b({names})\b", r"\1_2", VARIANTS["torchscript"]).replace("(x", "(y_1").replace("y_2", "y")
    first = re.sub(r"\by\b", "y_1", VARIANTS["torchscript"])
    model = parse(graph(first + second))
    assert FuseLayerNorm()(model).edits == 2
    gammas = [node.inputs[1] for node in model.graph if node.op_type == "LayerNormalization"]
    assert gammas[0] is not gammas[1]
    assert np.array_equal(gammas[0].const_value.numpy(), gammas[1].const_value.numpy())


NEGATIVES = {
    "middle_read_elsewhere": QUOTIENT + "  scaled = Mul(n, gamma)\n  y = Add(scaled, variance)\n",
    "difference_read_elsewhere": QUOTIENT + "  y = Add(n, d)\n",
    "other_mean": QUOTIENT.replace("Sub(x, mean)", "Sub(x, other)").replace(
        "  d =", "  twice = Mul(x, two)\n  other = ReduceMean(twice, axes)\n  d ="
    )
    + AFFINE,
    "cube": QUOTIENT.replace("float two", "").replace("Pow(d, two)", "Pow(d, gamma)") + AFFINE,
    "no_square_root": MOMENTS + "  n = Div(d, shifted)\n" + AFFINE,
    "keepdims_off": VARIANTS["torchscript"].replace("ReduceMean(square, axes)", "ReduceMean<keepdims=0>(square, axes)"),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_left_alone(parse, name):
    model = parse(graph(NEGATIVES[name]))
    text = ir.to_onnx_text(model)
    assert FuseLayerNorm()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_other_axis_is_left_alone(parse):
    model = parse(
        graph(VARIANTS["torchscript"].replace("axes", "axis_1").replace("gamma", "half")).replace(
            "float two", "int64[1] axis_1 = {1}, float two"
        )
    )
    text = ir.to_onnx_text(model)
    assert FuseLayerNorm()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_graph_output_in_the_middle_is_left_alone(parse):
    model = parse(graph(VARIANTS["torchscript"], "g (float[b,3,4] x) => (float[b,3,4] y, float[b,3,4] d)"))
    text = ir.to_onnx_text(model)
    assert FuseLayerNorm()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_affine_along_another_axis_stays_outside(parse):
    body = QUOTIENT + "  y = Mul(n, column)\n"
    model = parse(graph(body).replace("float two", "float[3,1] column = {1,2,3}, float two"))
    FuseLayerNorm()(model)
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "Mul"]


def test_wrong_stage_raises(parse):
    model = parse(graph(VARIANTS["torchscript"]))
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="fuse-layer-norm"):
        FuseLayerNorm()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[b,3,4] x) => (float[b,3,4] y)
   <float[4] "y/gamma" =  {1.5,-2,0.25,3}, float[4] "y/beta" =  {0,0,0,0}, float[4] "y/gamma", float[4] "y/beta">
{
   ["y/LayerNormalization"] y = LayerNormalization <axis: int = -1, epsilon: float = 0.001> (x, "y/gamma", "y/beta")
}
"""
