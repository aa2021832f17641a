from collections.abc import Callable

import onnx_ir as ir
import pytest

from mptqc.errors import VerifyError
from mptqc.graph.verify import check_structure
from mptqc.passes.base import run_passes
from mptqc.passes.lower_to_cpu import LowerToCpu
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import QuantPlan
from mptqc.recipe import Target

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]


def quantized(block: MakeModel, plan: QuantPlan) -> ir.Model:
    return run_passes(block(), [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights()])


def test_a_compiled_model_passes(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan()
    check_structure(quantized(block, plan), plan)


def test_a_planned_linear_that_is_float_is_named(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan()
    partly = plan.model_copy(update={"layers": plan.layers[1:]})
    with pytest.raises(VerifyError, match=rf"1 planned sites .*{plan.layers[0].site} \(0 of 1\)"):
        check_structure(quantized(block, partly), plan)


def test_a_planned_attention_that_is_float_is_named(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan()
    with pytest.raises(VerifyError, match=r"block00\.attention \(0 of 2\)"):
        check_structure(quantized(block, plan.model_copy(update={"attentions": ()})), plan)


def test_an_integer_product_that_is_not_planned_is_named(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan()
    with pytest.raises(VerifyError, match=r"block00\.attention \(2 of 0\)"):
        check_structure(quantized(block, plan), plan.model_copy(update={"attentions": ()}))


def test_a_portable_model_holds_standard_operators_only(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan()
    model = quantized(block, plan)
    LowerToCpu()(model)
    with pytest.raises(VerifyError, match=r"com\.microsoft::MatMulIntegerToFloat \(×8\), which target 'portable'"):
        check_structure(model, plan)
    check_structure(model, block_plan(target=Target.CPU))


def test_illegal_onnx_is_refused(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan()
    model = quantized(block, plan)
    next(node for node in model.graph if node.op_type == "Gelu").op_type = "Gellu"
    with pytest.raises(VerifyError, match="not legal ONNX"):
        check_structure(model, plan)
