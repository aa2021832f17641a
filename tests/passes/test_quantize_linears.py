# ruff: noqa: E501 - the golden is ONNX text as it is printed
import collections
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantizers import opt_m

from mptqc.analysis.bit_variables import REDUCED_BITS
from mptqc.errors import PlanError
from mptqc.graph.edit import constant_of
from mptqc.graph.io import serialize
from mptqc.graph.match import find_linears
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import ActivationQuantizer, LayerPlan, MultiRegion, QuantPlan, Uniform
from mptqc.recipe import Recipe
from mptqc.reference.quantizers import integer_linear, quantize_weight
from mptqc.reference.trellis import decode
from mptqc.runtime.fused_ops import optimized_op_counts
from mptqc.runtime.machine import saturates_here
from mptqc.runtime.session import create_session

EPSILON = 2.0**-23
# Scale · scale, sum · scale and + bias are each rounded once, in float32, on both sides; |sum · scale| and |bias| bound
# what is rounded. (The integer sums are exact.)
ROUNDINGS = 4

Array = NDArray[np.float32]
MakeSmoothed = Callable[..., ir.Model]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def one_linear(smoothed: MakeSmoothed, shape: str = "n, 5, 6") -> ir.Model:
    return smoothed(
        f"float[{shape}] x",
        "float[] y",
        "p = MatMul (x, w) y = Add (p, b)",
        {"p": "block00.fc2"},
        {"w": random(6, 4), "b": random(4)},
    )


def plan_of(model: ir.Model, quantizer: ActivationQuantizer, bits: int = 8) -> QuantPlan:
    """Every Linear of the model through one quantizer, nearest weights at their largest magnitude."""
    arrays = {
        f"{linear.site}/weight_scale": (np.abs(linear.weight).max(axis=0) / (2 ** (bits - 1) - 1)).astype(np.float32)
        for linear in find_linears(model)
    }
    layers = tuple(LayerPlan(site=linear.site, weight_bits=bits, input=quantizer) for linear in find_linears(model))
    return QuantPlan(model_digest="0", recipe=Recipe(), layers=layers, arrays=arrays)


QUANTIZER = Uniform(bits=8, scale=1 / 32, zero_point=120)
# Integers, not st.floats: hypothesis refuses to make floats once a session flushes denormals to zero in this thread.
SCALES = st.integers(1, 2**10).map(lambda i: i / 2**8)
QUANTIZERS = st.one_of(
    st.builds(
        lambda bits, scale, part: Uniform(bits=bits, scale=scale, zero_point=part * (2**bits - 1) // 9),
        st.integers(2, 8),
        SCALES,
        st.integers(0, 9),
    ),
    SCALES.map(lambda scale: opt_m(bits=4, scale=scale, zero_point=1, m=2, low_codes=6)),
)


def run(model: ir.Model, x: Array) -> Array:
    return np.asarray(create_session(serialize(model), threads=1).run(None, {"x": x})[0])


def op_counts(model: ir.Model) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in model.graph))


# Sums of two products of 8-bit codes saturate in ONNX Runtime on some processors.
MOST_WEIGHT_BITS = REDUCED_BITS if saturates_here() else 8


@settings(max_examples=30, deadline=None)
@given(quantizer=QUANTIZERS, bits=st.integers(2, MOST_WEIGHT_BITS))
def test_output_equals_the_reference(smoothed: MakeSmoothed, quantizer: ActivationQuantizer, bits: int) -> None:
    model = one_linear(smoothed)
    (linear,) = find_linears(model)
    plan, weight, bias = plan_of(model, quantizer, bits), linear.weight, linear.bias
    QuantizeLinears(plan)(model)
    x = 4 * random(3, 5, 6, seed=1)
    scale = plan.array("block00.fc2/weight_scale")
    codes = quantize_weight(weight, scale, bits)
    expected = integer_linear(quantizer, x, codes, scale, bias)
    size = np.abs(expected - bias) + np.abs(bias)
    assert (np.abs(run(model, x) - expected) <= ROUNDINGS * EPSILON * size).all()


@pytest.mark.parametrize("shape", ["n, 6", "3, 6", "n, 5, 6", "3, 5, 6", "n, 2, 5, 6", "3, 2, 5, 6"])
@pytest.mark.parametrize("quantizer", [QUANTIZER, opt_m(bits=4, scale=0.1, zero_point=1, m=2, low_codes=6)])
def test_onnx_runtime_fuses_the_product_with_its_bias(
    smoothed: MakeSmoothed, shape: str, quantizer: ActivationQuantizer
) -> None:
    model = one_linear(smoothed, shape)
    QuantizeLinears(plan_of(model, quantizer))(model)
    counts = optimized_op_counts(serialize(model))
    assert counts["MatMulIntegerToFloat"] == 1
    assert not counts.keys() & {"MatMul", "Gemm", "MatMulInteger", "Cast", "Mul"}
    assert ("QLinearAdd" in counts) == ("Add" in op_counts(model) and isinstance(quantizer, MultiRegion))
    assert "Add" not in counts


def test_planned_codes_are_taken_as_they_are(smoothed: MakeSmoothed) -> None:
    model = one_linear(smoothed)
    plan = plan_of(model, QUANTIZER, 4)
    codes = np.random.default_rng(5).integers(-8, 8, (6, 4)).astype(np.int8)
    QuantizeLinears(plan.with_arrays({"block00.fc2/weight_codes": codes}))(model)
    (product,) = [node for node in model.graph if node.op_type == "MatMulInteger"]
    found = constant_of(product.inputs[1])
    assert found is not None
    assert np.array_equal(found, codes)


def three_readers(smoothed: MakeSmoothed) -> ir.Model:
    """A value, through movement, to three Linears and a residual that does not move."""
    return smoothed(
        "float[n, 6, 5] x",
        "float[] yq, float[] yk, float[] yv",
        "h = Relu (x) t = Transpose <perm = [0, 2, 1]> (h) "
        "q = MatMul (t, wq) yq = Add (q, b) k = MatMul (t, wk) yk = Add (k, b) v = MatMul (t, wv) yv = Add (v, b)",
        {"q": "block00.q", "k": "block00.k", "v": "block00.v"},
        {"wq": random(6, 4, seed=1), "wk": random(6, 4, seed=2), "wv": random(6, 4, seed=3), "b": random(4)},
    )


def test_readers_of_one_value_share_a_quantizer_above_the_movement(smoothed: MakeSmoothed) -> None:
    model = three_readers(smoothed)
    result = QuantizeLinears(plan_of(model, QUANTIZER))(model)
    assert result.edits == 3
    assert op_counts(model)["QuantizeLinear"] == 1
    (quantize,) = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert quantize.inputs[0] is not None and quantize.inputs[0].name == "h"
    (transpose,) = [node for node in model.graph if node.op_type == "Transpose"]
    assert transpose.inputs[0] is quantize.outputs[0]


def test_readers_with_other_quantizers_do_not_share(smoothed: MakeSmoothed) -> None:
    model = three_readers(smoothed)
    plan = plan_of(model, QUANTIZER)
    other = plan.layers[0].model_copy(update={"input": QUANTIZER.model_copy(update={"scale": 0.5})})
    QuantizeLinears(plan.model_copy(update={"layers": (other, *plan.layers[1:])}))(model)
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert [node.inputs[0].name for node in quantizers if node.inputs[0] is not None] == ["t", "t"]


def test_movement_with_a_float_reader_stays_above_the_quantizer(smoothed: MakeSmoothed) -> None:
    model = smoothed(
        "float[n, 6, 5] x",
        "float[] y, float[] z",
        "t = Transpose <perm = [0, 2, 1]> (x) p = MatMul (t, w) y = Add (p, b) z = Relu (t)",
        {"p": "block00.fc1"},
        {"w": random(6, 4), "b": random(4)},
    )
    QuantizeLinears(plan_of(model, QUANTIZER))(model)
    assert op_counts(model)["Transpose"] == 1
    (quantize,) = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert quantize.inputs[0] is not None and quantize.inputs[0].name == "t"


ZERO, ONE, TWO, NINE = (np.array([at], np.int64) for at in (0, 1, 2, 9))


def test_a_roll_moves_codes(smoothed: MakeSmoothed) -> None:
    model = smoothed(
        "float[n, 5, 6] x",
        "float[] y",
        "h = Relu (x) tail = Slice (h, two, nine, one) start = Slice (h, zero, two, one) "
        "r = Concat <axis = 1> (tail, start) p = MatMul (r, w) y = Add (p, b)",
        {"p": "block00.q"},
        {"w": random(6, 4), "b": random(4), "zero": ZERO, "one": ONE, "two": TWO, "nine": NINE},
    )
    before = run(model, x := np.abs(random(2, 5, 6)))
    QuantizeLinears(plan_of(model, Uniform(bits=8, scale=float(x.max()) / 255, zero_point=0)))(model)
    assert op_counts(model)["QuantizeLinear"] == 1
    assert {node.inputs[0].dtype for node in model.graph if node.op_type == "Slice" and node.inputs[0]} == {
        ir.DataType.UINT8
    }
    after = run(model, x)
    assert np.corrcoef(before.reshape(-1), after.reshape(-1))[0, 1] > 0.999  # a wrong roll would be uncorrelated


def test_a_lone_slice_is_quantized_after_it(smoothed: MakeSmoothed) -> None:
    model = smoothed(
        "float[n, 5, 6] x",
        "float[] y",
        "h = Relu (x) s = Slice (h, zero, one, one) p = MatMul (s, w) y = Add (p, b)",
        {"p": "head"},
        {"w": random(6, 4), "b": random(4), "zero": ZERO, "one": ONE},
    )
    QuantizeLinears(plan_of(model, QUANTIZER))(model)
    (quantize,) = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert quantize.inputs[0] is not None and quantize.inputs[0].name == "s"


def test_an_unplanned_linear_stays_float(smoothed: MakeSmoothed) -> None:
    model = three_readers(smoothed)
    plan = plan_of(model, QUANTIZER)
    QuantizeLinears(plan.model_copy(update={"layers": plan.layers[:2]}))(model)
    assert [linear.site for linear in find_linears(model)] == ["block00.v"]
    assert op_counts(model)["MatMulInteger"] == 2


def test_a_planned_site_that_is_missing_is_named_and_nothing_changes(smoothed: MakeSmoothed) -> None:
    model = one_linear(smoothed)
    plan = plan_of(model, QUANTIZER)
    missing = plan.layers[0].model_copy(update={"site": "block07.fc1"})
    before = serialize(model)
    with pytest.raises(PlanError, match=r"block07\.fc1"):
        QuantizeLinears(plan.model_copy(update={"layers": (*plan.layers, missing)}))(model)
    assert serialize(model) == before


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"weight_scale": np.ones(3, np.float32)}, r"shape \(3,\)"),
        ({"weight_scale": np.zeros(4, np.float32)}, "above zero"),
        ({"weight_codes": np.zeros((4, 6), np.int8)}, r"int8 \(4, 6\)"),
        ({"weight_codes": np.full((6, 4), 8, np.int8)}, "from -8 to 7"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    smoothed: MakeSmoothed, arrays: dict[str, NDArray[np.generic]], problem: str
) -> None:
    model = one_linear(smoothed)
    plan = plan_of(model, QUANTIZER, 4).with_arrays({f"block00.fc2/{key}": array for key, array in arrays.items()})
    with pytest.raises(PlanError, match=problem):
        QuantizeLinears(plan)(model)


def test_codes_of_a_trellis_are_decoded(smoothed: MakeSmoothed) -> None:
    model = one_linear(smoothed)
    plan = plan_of(model, QUANTIZER, 4)
    by_trellis = plan.model_copy(update={"layers": (plan.layers[0].model_copy(update={"trellis": True}),)})
    with pytest.raises(PlanError, match=r"block00\.fc2: the plan has no codes"):
        QuantizeLinears(by_trellis)(model)
    codes = np.random.default_rng(0).integers(-8, 8, (6, 4), np.int8)
    QuantizeLinears(by_trellis.with_arrays({"block00.fc2/weight_codes": codes}))(model)
    (product,) = (node for node in model.graph if node.op_type == "MatMulInteger")
    found = constant_of(product.inputs[1])
    assert found is not None
    assert np.array_equal(found, decode(codes, 4))


def test_a_model_that_is_not_smoothed_is_refused(smoothed: MakeSmoothed) -> None:
    model = one_linear(smoothed)
    plan = plan_of(model, QUANTIZER)
    model.metadata_props[STAGE_KEY] = Stage.QUANTIZED
    with pytest.raises(StageError, match="quantize-linears"):
        QuantizeLinears(plan)(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21],
   metadata_props: ["mptqc.stage": "smoothed"]
>
g (float[n,2] x) => (float[] y)
   <float[2] b =  {1,2}, float "head/scale" =  {0.5}, uint8 "head/quantize_zero_point" =  {3}, uint8 "head/quantize_maximum" =  {15}, uint8 "mptqc/one" =  {1}, float[2] "head/weight_scale" =  {0.14285715,0.035714287}, int8[2,2] "head/weight" =  {3,-7,7,3}, float[2] b, float "head/scale", uint8 "head/quantize_zero_point", uint8 "head/quantize_maximum", uint8 "mptqc/one", float[2] "head/weight_scale", int8[2,2] "head/weight", uint8[n,2] "head/quantize_output", uint8[n,2] "head/quantize_clip_output", int32[] "head/product_output", float[] "head/product_as_float_output", float[] "head/product_scaled_output">
{
   ["head/quantize"] "head/quantize_output" = QuantizeLinear (x, "head/scale", "head/quantize_zero_point")
   ["head/quantize_clip"] "head/quantize_clip_output" = Clip ("head/quantize_output", "", "head/quantize_maximum")
   ["head/open_scale"] "head/open_scale_output" = DequantizeLinear ("mptqc/one", "head/scale")
   ["head/product_scale"] "head/product_scale_output" = Mul ("head/open_scale_output", "head/weight_scale")
   ["head/product"] "head/product_output" = MatMulInteger ("head/quantize_clip_output", "head/weight", "head/quantize_zero_point")
   ["head/product_as_float"] "head/product_as_float_output" = Cast <to: int = 1> ("head/product_output")
   ["head/product_scaled"] "head/product_scaled_output" = Mul ("head/product_as_float_output", "head/product_scale_output")
   ["head/add_bias"] y = Add ("head/product_scaled_output", b)
}
"""


def test_golden(smoothed: MakeSmoothed, as_text: Callable[[ir.Model], str]) -> None:
    model = smoothed(
        "float[n, 2] x",
        "float[] y",
        "p = MatMul (x, w) y = Add (p, b)",
        {"p": "head"},
        {"w": np.array([[0.5, -0.25], [1.0, 0.125]], np.float32), "b": np.array([1.0, 2.0], np.float32)},
    )
    QuantizeLinears(plan_of(model, Uniform(bits=4, scale=0.5, zero_point=3), 4))(model)
    assert as_text(model) == GOLDEN
