# ruff: noqa: E501 - the golden is ONNX text as it is printed
import collections
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.verify import verify_compiled
from mptqc.errors import PlanError
from mptqc.graph.io import serialize
from mptqc.graph.match import find_attentions
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.plan import AttentionPlan, QuantPlan, Uniform
from mptqc.recipe import Recipe
from mptqc.runtime.fused_ops import optimized_op_counts

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]
X = np.random.default_rng(1).normal(size=(3, 7, 12)).astype(np.float32)


def attentions_only(plan: QuantPlan) -> QuantPlan:
    return plan.model_copy(update={"layers": ()})


def op_counts(model: ir.Model) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in model.graph))


@pytest.mark.parametrize(("bits", "two_region"), [*((bits, False) for bits in range(2, 9)), (4, True), (5, True)])
def test_both_products_equal_the_reference(block: MakeModel, block_plan: MakePlan, bits: int, two_region: bool) -> None:
    model, plan = block(), attentions_only(block_plan(activation_bits=bits, two_region=two_region))
    result = QuantizeAttentions(plan)(model)
    assert result.edits == 2
    report = verify_compiled(model, plan, X)
    assert [check.product for check in report.sites] == ["block00.attention/scores", "block00.attention/context"]
    assert all(check.fused and check.codes > 0 for check in report.sites)


def test_operands_are_quantized_before_their_heads_are_parted(block: MakeModel, block_plan: MakePlan) -> None:
    model = block()
    QuantizeAttentions(attentions_only(block_plan(8, 8, two_region=False)))(model)
    read = {str(node.inputs[0].name) for node in model.graph if node.op_type == "QuantizeLinear" and node.inputs[0]}
    assert read == {"ql", "kl", "vl", "a"}
    read_by_transposes = [
        node.inputs[0].dtype for node in model.graph if node.op_type == "Transpose" and node.inputs[0]
    ]
    types = collections.Counter(read_by_transposes)
    assert types == {ir.DataType.UINT8: 1, ir.DataType.INT8: 2, ir.DataType.FLOAT: 1}


def test_masks_stay_float(block: MakeModel, block_plan: MakePlan) -> None:
    model = block()
    QuantizeAttentions(attentions_only(block_plan()))(model)
    (softmax,) = [node for node in model.graph if node.op_type == "Softmax"]
    assert softmax.inputs[0] is not None
    masked = softmax.inputs[0].producer()
    assert masked is not None and masked.op_type == "Add" and masked.name == "sm"


def test_a_split_between_the_linear_and_the_product_is_quantized_after_it(
    smoothed: Callable[..., ir.Model],
) -> None:
    generator = np.random.default_rng(0)
    model = smoothed(
        "float[n, 3, 18] x",
        "float[n, 3, 6] y",
        "q, kt, v = Split <axis = 2, num_outputs = 3> (x)\n"
        "k = Transpose <perm = [0, 2, 1]> (kt) s = MatMul (q, k) a = Softmax <axis = -1> (s) y = MatMul (a, v)",
        {"a": "block00.attention"},
        {},
    )
    middle = Uniform(bits=8, scale=1 / 32, zero_point=128)
    attention = AttentionPlan(
        site="block00.attention", q=middle, k=middle, v=middle, p=Uniform(bits=8, scale=1 / 255, zero_point=0)
    )
    plan = QuantPlan(model_digest="0", recipe=Recipe(), attentions=(attention,))
    QuantizeAttentions(plan)(model)
    assert op_counts(model)["Split"] == 1
    assert optimized_op_counts(serialize(model))["MatMulIntegerToFloat"] == 2
    verify_compiled(model, plan, generator.normal(size=(2, 3, 18)).astype(np.float32))


def test_an_unplanned_attention_stays_float(block: MakeModel, block_plan: MakePlan) -> None:
    model = block()
    before = serialize(model)
    result = QuantizeAttentions(block_plan().model_copy(update={"attentions": ()}))(model)
    assert not result.modified
    assert serialize(model) == before


def test_a_planned_site_that_is_missing_is_named_and_nothing_changes(block: MakeModel, block_plan: MakePlan) -> None:
    model, plan = block(), block_plan()
    other = plan.attentions[0].model_copy(update={"site": "block09.attention"})
    before = serialize(model)
    with pytest.raises(PlanError, match=r"block09\.attention"):
        QuantizeAttentions(plan.model_copy(update={"attentions": (*plan.attentions, other)}))(model)
    assert serialize(model) == before


def test_a_second_run_says_that_the_site_is_gone(block: MakeModel, block_plan: MakePlan) -> None:
    model, plan = block(), block_plan()
    QuantizeAttentions(plan)(model)
    assert not find_attentions(model)
    with pytest.raises(PlanError, match=r"block00\.attention"):
        QuantizeAttentions(plan)(model)


def test_a_model_that_is_not_smoothed_is_refused(block: MakeModel, block_plan: MakePlan) -> None:
    model = block()
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="quantize-attentions"):
        QuantizeAttentions(block_plan())(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21],
   metadata_props: ["mptqc.stage": "smoothed"]
>
g (float[n,3,6] q, float[n,6,3] k, float[n,3,6] v) => (float[] y)
   <float "block00.attention/q/scale" =  {0.03125}, uint8 "block00.attention/q/quantize_zero_point" =  {128}, float "block00.attention/k/scale" =  {0.03125}, int8 "block00.attention/k/quantize_zero_point" =  {0}, uint8 "mptqc/one" =  {1}, float "block00.attention/p/scale" =  {0.125}, uint8 "block00.attention/p/quantize_zero_point" =  {240}, float "block00.attention/v/scale" =  {0.03125}, int8 "block00.attention/v/quantize_zero_point" =  {0}, float "block00.attention/q/scale", uint8 "block00.attention/q/quantize_zero_point", float "block00.attention/k/scale", int8 "block00.attention/k/quantize_zero_point", uint8 "mptqc/one", float "block00.attention/p/scale", uint8 "block00.attention/p/quantize_zero_point", float "block00.attention/v/scale", int8 "block00.attention/v/quantize_zero_point", uint8[n,3,6] "block00.attention/q/quantize_output", int8[n,6,3] "block00.attention/k/quantize_output", int32[] "block00.attention/scores_output", float[] "block00.attention/scores_as_float_output", float[] "block00.attention/scores_scaled_output", uint8[] "block00.attention/p/quantize_output", int8[n,3,6] "block00.attention/v/quantize_output", int32[] "block00.attention/context_output", float[] "block00.attention/context_as_float_output">
{
   ["block00.attention/q/quantize"] "block00.attention/q/quantize_output" = QuantizeLinear (q, "block00.attention/q/scale", "block00.attention/q/quantize_zero_point")
   ["block00.attention/k/quantize"] "block00.attention/k/quantize_output" = QuantizeLinear (k, "block00.attention/k/scale", "block00.attention/k/quantize_zero_point")
   ["block00.attention/q/open_scale"] "block00.attention/q/open_scale_output" = DequantizeLinear ("mptqc/one", "block00.attention/q/scale")
   ["block00.attention/scores_scale"] "block00.attention/scores_scale_output" = Mul ("block00.attention/q/open_scale_output", "block00.attention/k/scale")
   ["block00.attention/scores"] "block00.attention/scores_output" = MatMulInteger ("block00.attention/q/quantize_output", "block00.attention/k/quantize_output", "block00.attention/q/quantize_zero_point", "block00.attention/k/quantize_zero_point")
   ["block00.attention/scores_as_float"] "block00.attention/scores_as_float_output" = Cast <to: int = 1> ("block00.attention/scores_output")
   ["block00.attention/scores_scaled"] "block00.attention/scores_scaled_output" = Mul ("block00.attention/scores_as_float_output", "block00.attention/scores_scale_output")
   [a] a = Softmax <axis: int = -1> ("block00.attention/scores_scaled_output")
   ["block00.attention/p/quantize"] "block00.attention/p/quantize_output" = QuantizeLinear (a, "block00.attention/p/scale", "block00.attention/p/quantize_zero_point")
   ["block00.attention/v/quantize"] "block00.attention/v/quantize_output" = QuantizeLinear (v, "block00.attention/v/scale", "block00.attention/v/quantize_zero_point")
   ["block00.attention/p/open_scale"] "block00.attention/p/open_scale_output" = DequantizeLinear ("mptqc/one", "block00.attention/p/scale")
   ["block00.attention/context_scale"] "block00.attention/context_scale_output" = Mul ("block00.attention/p/open_scale_output", "block00.attention/v/scale")
   ["block00.attention/context"] "block00.attention/context_output" = MatMulInteger ("block00.attention/p/quantize_output", "block00.attention/v/quantize_output", "block00.attention/p/quantize_zero_point", "block00.attention/v/quantize_zero_point")
   ["block00.attention/context_as_float"] "block00.attention/context_as_float_output" = Cast <to: int = 1> ("block00.attention/context_output")
   ["block00.attention/context_scaled"] y = Mul ("block00.attention/context_as_float_output", "block00.attention/context_scale_output")
}
"""


def test_golden(smoothed: Callable[..., ir.Model], as_text: Callable[[ir.Model], str]) -> None:
    model = smoothed(
        "float[n, 3, 6] q, float[n, 6, 3] k, float[n, 3, 6] v",
        "float[] y",
        "s = MatMul (q, k) a = Softmax <axis = -1> (s) y = MatMul (a, v)",
        {"a": "block00.attention"},
        {},
    )
    middle = Uniform(bits=8, scale=1 / 32, zero_point=128)
    attention = AttentionPlan(
        site="block00.attention", q=middle, k=middle, v=middle, p=Uniform(bits=4, scale=0.125, zero_point=0)
    )
    QuantizeAttentions(QuantPlan(model_digest="0", recipe=Recipe(), attentions=(attention,)))(model)
    assert as_text(model) == GOLDEN
