# ruff: noqa: E501 - the golden is ONNX text as it is printed
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from quantizers import opt_m

from mptqc.analysis.observe import with_outputs
from mptqc.errors import PlanError
from mptqc.graph.io import serialize
from mptqc.graph.quantized_tensors import find_quantized_tensors
from mptqc.passes.base import STAGE_KEY, Stage, StageError, run_passes
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.passes.quantize_tensors import QuantizeTensors
from mptqc.plan import ActivationQuantizer, QuantPlan, TensorPlan, Uniform
from mptqc.recipe import Recipe, TensorKind
from mptqc.reference.quantizers import dequantize, fake_quantize, quantize
from mptqc.runtime.fused_ops import optimized_op_counts
from mptqc.runtime.session import create_session

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]
Smoothed = Callable[..., ir.Model]
RESIDUAL = """
  p = MatMul (x, w)
  o = Add (p, b)
  s = Add (x, o)
  n = LayerNormalization <axis = -1> (s, gamma, beta)
  hp = MatMul (n, w)
  h = Add (hp, b)
  y = Add (s, h)
"""
SITES = {"p": "block00.proj", "n": "block00.norm2", "hp": "head"}
EXPONENTS = np.array([0, 3, 0, 1, 0, 0], np.int8)
X = np.random.default_rng(1).normal(size=(3, 5, 6)).astype(np.float32) * np.exp2(EXPONENTS).astype(np.float32)


@pytest.fixture
def residual(smoothed: Smoothed) -> MakeModel:
    """A Linear, the sum that it enters, a norm of the sum, a head: x [n, 5, 6] to y."""

    def make() -> ir.Model:
        random = np.random.default_rng(3)
        arrays = {"w": random.normal(size=(6, 6)).astype(np.float32)}
        arrays |= {name: random.normal(size=6).astype(np.float32) for name in ("b", "gamma", "beta")}
        return smoothed("float[n, 5, 6] x", "float[n, 5, 6] y", RESIDUAL, SITES, arrays)

    return make


def plan_of(*tensors: TensorPlan) -> QuantPlan:
    return QuantPlan(model_digest="0", recipe=Recipe(), tensors=tensors)


def stream(quantizer: ActivationQuantizer, *, exponents: bool = False) -> TensorPlan:
    return TensorPlan(site="block00.norm2.input", kind=TensorKind.NORM_INPUT, quantizer=quantizer, exponents=exponents)


def values(model: ir.Model, names: list[str], *, optimized: bool = False) -> list[NDArray[np.generic]]:
    session = create_session(with_outputs(model, names), threads=1, graph_optimization=optimized)
    return [np.asarray(value) for value in session.run(names, {"x": X})]


QUANTIZERS = [
    *(Uniform(bits=bits, scale=12 / 2**bits, zero_point=2 ** (bits - 1) - 1) for bits in range(2, 9)),
    opt_m(bits=4, scale=0.3, zero_point=3, m=2, low_codes=8),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda quantizer: f"{quantizer.kind}{quantizer.bits}")
def test_readers_get_the_reference_to_the_last_bit(residual: MakeModel, quantizer: ActivationQuantizer) -> None:
    model = residual()
    assert QuantizeTensors(plan_of(stream(quantizer)))(model).edits == 1
    (tensor,) = find_quantized_tensors(model)
    assert tensor.x is not None
    read = {str(use.name) for node in model.graph if node.name in ("n", "y") for use in node.inputs[:1] if use}
    assert read == {str(tensor.result.name)}
    x, result = values(model, ["s", str(tensor.result.name)])
    assert np.array_equal(result, fake_quantize(quantizer, x.astype(np.float32)))
    codes = codes_of(model)
    assert np.array_equal(codes - tensor.zero_point, quantize(quantizer, x.astype(np.float32)) - quantizer.zero_point)


def codes_of(model: ir.Model) -> NDArray[np.int32]:
    (tensor,) = find_quantized_tensors(model)
    model.graph.append(ir.node("Cast", [tensor.codes], {"to": int(ir.DataType.FLOAT)}, outputs=[ir.val("codes")]))
    return values(model, ["codes"])[0].astype(np.int32)


def test_exponents_scale_each_channel_by_its_power_of_two(residual: MakeModel) -> None:
    model, quantizer = residual(), Uniform(bits=5, scale=0.3, zero_point=15)
    plan = plan_of(stream(quantizer, exponents=True)).with_arrays({"block00.norm2.input/exponents": EXPONENTS})
    QuantizeTensors(plan)(model)
    (tensor,) = find_quantized_tensors(model)
    factor = np.exp2(EXPONENTS.astype(np.float32))
    assert tensor.x is not None and tensor.x.name == "s"
    assert np.array_equal(tensor.scale, np.float32(0.3) * factor)
    x, result = values(model, ["s", str(tensor.result.name)])
    expected = dequantize(quantizer, quantize(quantizer, x.astype(np.float32) / factor)) * factor
    assert np.array_equal(result, expected)


def test_onnxruntime_fuses_nothing_into_operators_that_round_otherwise(residual: MakeModel) -> None:
    quantizer = Uniform(bits=8, scale=0.05, zero_point=128)
    tensors = [stream(quantizer)]
    tensors.append(TensorPlan(site="block00.proj.output", kind=TensorKind.PRODUCT_OUTPUT, quantizer=quantizer))
    model = residual()
    QuantizeTensors(plan_of(*tensors))(model)
    assert not [op for op in optimized_op_counts(serialize(model)) if "QLinear" in op]
    plain, optimized = (values(model, ["y"], optimized=flag)[0] for flag in (False, True))
    # One flipped code (a float sum at a tie) is 0.05 through a norm and a Linear; float rounding is far below that.
    assert np.abs(plain.astype(np.float64) - optimized).max() < 1e-4


def test_a_whole_block_keeps_its_fused_products(block: MakeModel, block_plan: MakePlan) -> None:
    quantizer = Uniform(bits=8, scale=0.05, zero_point=128)
    scores = TensorPlan(site="block00.attention.scores", kind=TensorKind.SCORES, quantizer=quantizer)
    gelu = TensorPlan(site="block00.fc1.output", kind=TensorKind.GELU_INPUT, quantizer=quantizer)
    plan = block_plan(8, 8, two_region=False).model_copy(update={"tensors": (scores, gelu)})
    model = run_passes(block(), [QuantizeTensors(plan), QuantizeLinears(plan), QuantizeAttentions(plan)])
    counts = optimized_op_counts(serialize(model))
    assert counts["MatMulIntegerToFloat"] == 8
    assert counts["Softmax"] == counts["Gelu"] == 1
    assert not [op for op in counts if "QLinear" in op]


def test_what_only_gelu_reads_needs_no_multiplication(block: MakeModel) -> None:
    model = block()
    gelu = TensorPlan(
        site="block00.fc1.output", kind=TensorKind.GELU_INPUT, quantizer=Uniform(bits=8, scale=0.05, zero_point=128)
    )
    before = [node.op_type for node in model.graph].count("Mul")
    QuantizeTensors(plan_of(gelu))(model)
    assert [node.op_type for node in model.graph].count("Mul") == before
    (tensor,) = find_quantized_tensors(model)
    assert tensor.scale == np.float32(0.05)
    assert [node.op_type for node in tensor.result.consumers()] == ["Gelu"]


def test_an_unplanned_tensor_stays_float(residual: MakeModel) -> None:
    model = residual()
    before = serialize(model)
    assert not QuantizeTensors(plan_of())(model).modified
    assert serialize(model) == before


def test_a_tensor_that_is_an_output_is_missing_by_name_and_nothing_changes(residual: MakeModel) -> None:
    model = residual()
    model.graph.outputs.append(next(node.outputs[0] for node in model.graph if node.name == "s"))
    before = serialize(model)
    with pytest.raises(PlanError, match=r"block00\.norm2\.input"):
        QuantizeTensors(plan_of(stream(QUANTIZERS[0])))(model)
    assert serialize(model) == before


def test_a_second_run_says_that_the_tensor_is_quantized(residual: MakeModel) -> None:
    model, plan = residual(), plan_of(stream(QUANTIZERS[-2]))
    QuantizeTensors(plan)(model)
    before = serialize(model)
    with pytest.raises(PlanError, match=r"block00\.norm2\.input, which .* quantized already"):
        QuantizeTensors(plan)(model)
    assert serialize(model) == before


@pytest.mark.parametrize(
    "exponents", [np.array([1, 2], np.int8), np.array([0, 61], np.int8), np.zeros((1, 6), np.int8)]
)
def test_exponents_that_cannot_be_are_refused(residual: MakeModel, exponents: NDArray[np.int8]) -> None:
    plan = plan_of(stream(QUANTIZERS[0], exponents=True)).with_arrays({"block00.norm2.input/exponents": exponents})
    with pytest.raises(PlanError, match=r"block00\.norm2\.input: exponents"):
        QuantizeTensors(plan)(residual())


def test_a_quantizer_that_does_not_fit_is_refused(residual: MakeModel) -> None:
    with pytest.raises(PlanError, match=r"block00\.norm2\.input: zero point 9"):
        QuantizeTensors(plan_of(stream(Uniform(bits=3, scale=0.1, zero_point=9))))(residual())


def test_a_model_that_is_not_smoothed_is_refused(residual: MakeModel) -> None:
    model = residual()
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="quantize-tensors"):
        QuantizeTensors(plan_of(stream(QUANTIZERS[0])))(model)


GOLDEN = """\
{
   [p] p = MatMul (x, w)
   [o] o = Add (p, b)
   ["block00.proj.output/quantize"] "block00.proj.output/quantize_output" = QuantizeLinear (o, "block00.proj.output/scale", "block00.proj.output/quantize_zero_point")
   ["block00.proj.output/dequantize"] "block00.proj.output/dequantize_output" = DequantizeLinear ("block00.proj.output/quantize_output", "mptqc/unit_scale", "block00.proj.output/quantize_zero_point")
   ["block00.proj.output/multiply"] "block00.proj.output/multiply_output" = Mul ("block00.proj.output/dequantize_output", "block00.proj.output/scale")
   [s] s = Add (x, "block00.proj.output/multiply_output")
   ["block00.norm2.input/divide"] "block00.norm2.input/divide_output" = Mul (s, "block00.norm2.input/divisor")
   ["block00.norm2.input/quantize"] "block00.norm2.input/quantize_output" = QuantizeLinear ("block00.norm2.input/divide_output", "block00.norm2.input/scale", "block00.norm2.input/quantize_zero_point")
   ["block00.norm2.input/quantize_clip"] "block00.norm2.input/quantize_clip_output" = Clip ("block00.norm2.input/quantize_output", "", "block00.norm2.input/quantize_maximum")
   ["block00.norm2.input/dequantize"] "block00.norm2.input/dequantize_output" = DequantizeLinear ("block00.norm2.input/quantize_clip_output", "mptqc/unit_scale", "block00.norm2.input/quantize_zero_point")
   ["block00.norm2.input/multiply"] "block00.norm2.input/multiply_output" = Mul ("block00.norm2.input/dequantize_output", "block00.norm2.input/channel_scale")
   [n] n = LayerNormalization <axis: int = -1> ("block00.norm2.input/multiply_output", gamma, beta)
   [hp] hp = MatMul (n, w)
   [h] h = Add (hp, b)
   [y] y = Add ("block00.norm2.input/multiply_output", h)
}
"""


def test_golden(residual: MakeModel, as_text: Callable[[ir.Model], str]) -> None:
    model = residual()
    QuantizeTensors(
        plan_of(
            stream(Uniform(bits=4, scale=0.5, zero_point=8), exponents=True),
            TensorPlan(
                site="block00.proj.output",
                kind=TensorKind.PRODUCT_OUTPUT,
                quantizer=Uniform(bits=8, scale=0.25, zero_point=128),
            ),
        ).with_arrays({"block00.norm2.input/exponents": EXPONENTS})
    )(model)
    text = as_text(model)
    assert text[text.index("{\n   [p]") :] == GOLDEN
