from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.verify import verify_compiled
from mptqc.errors import VerifyError
from mptqc.graph.edit import is_op
from mptqc.graph.verify import check_structure
from mptqc.passes.base import run_passes
from mptqc.passes.lower_to_cpu import LowerToCpu
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.passes.quantize_tensors import QuantizeTensors
from mptqc.plan import QuantPlan, TensorPlan, Uniform
from mptqc.recipe import Target, TensorKind

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]
X = np.random.default_rng(1).normal(size=(3, 7, 12)).astype(np.float32)
SCALE = 0.25
TENSORS = (
    TensorPlan(
        site="block00.attention.scores", kind=TensorKind.SCORES, quantizer=Uniform(bits=5, scale=SCALE, zero_point=15)
    ),
    TensorPlan(
        site="block00.fc1.output", kind=TensorKind.GELU_INPUT, quantizer=Uniform(bits=6, scale=SCALE, zero_point=31)
    ),
)


def compiled(block: MakeModel, plan: QuantPlan) -> ir.Model:
    steps = [QuantizeTensors(plan), QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights()]
    return run_passes(block(), steps)


@pytest.fixture
def full(block_plan: MakePlan) -> QuantPlan:
    return block_plan().model_copy(update={"tensors": TENSORS})


def test_products_and_tensors_are_counted(block: MakeModel, full: QuantPlan) -> None:
    report = verify_compiled(compiled(block, full), full, X)
    assert (report.integer_products, report.float_products, len(report.sites)) == (8, 0, 8)
    assert [check.site for check in report.tensors] == [tensor.site for tensor in TENSORS]
    assert all(check.codes > 0 and check.code_mismatches == 0 for check in report.tensors)


def test_the_cpu_target_has_the_same_tensors(block: MakeModel, full: QuantPlan) -> None:
    plan = full.model_copy(update={"recipe": full.recipe.model_copy(update={"target": Target.CPU})})
    model = compiled(block, plan)
    LowerToCpu()(model)
    assert len(verify_compiled(model, plan, X).tensors) == len(TENSORS)


def test_another_zero_point_is_found(block: MakeModel, full: QuantPlan) -> None:
    other = TENSORS[1].model_copy(update={"quantizer": Uniform(bits=6, scale=SCALE, zero_point=2)})
    with pytest.raises(VerifyError, match=r"1 of 2 quantized tensors .* the worst is block00\.fc1\.output"):
        verify_compiled(compiled(block, full), full.model_copy(update={"tensors": (TENSORS[0], other)}), X)


def test_another_scale_is_found(block: MakeModel, full: QuantPlan) -> None:
    other = TENSORS[0].model_copy(update={"quantizer": Uniform(bits=5, scale=0.26, zero_point=15)})
    with pytest.raises(VerifyError, match=r"block00\.attention\.scores: the scales"):
        verify_compiled(compiled(block, full), full.model_copy(update={"tensors": (other, TENSORS[1])}), X)


def test_a_reader_that_skips_the_zero_point_is_found(block: MakeModel, full: QuantPlan) -> None:
    model = compiled(block, full)
    opened = next(node for node in model.graph if node.name == "block00.fc1.output/dequantize")
    (quantize,) = [node for node in model.graph if node.name == "block00.fc1.output/quantize"]
    assert is_op(opened, "DequantizeLinear") and is_op(quantize, "QuantizeLinear")
    wrong = ir.val("wrong", const_value=ir.tensor(np.array(30, np.uint8), name="wrong"))
    model.graph.register_initializer(wrong)
    quantize.replace_input_with(2, wrong)
    with pytest.raises(VerifyError, match=r"the worst is block00\.fc1\.output"):
        verify_compiled(model, full, X)


def test_a_planned_tensor_that_is_float_is_named(block: MakeModel, full: QuantPlan) -> None:
    model = compiled(block, full.model_copy(update={"tensors": TENSORS[:1]}))
    with pytest.raises(VerifyError, match=r"1 tensors .* block00\.fc1\.output \(0 of 1\)"):
        check_structure(model, full)


def test_a_tensor_that_is_not_planned_is_named(block: MakeModel, full: QuantPlan) -> None:
    with pytest.raises(VerifyError, match=r"block00\.fc1\.output \(1 of 0\)"):
        check_structure(compiled(block, full), full.model_copy(update={"tensors": TENSORS[:1]}))
