from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.verify import verify_compiled
from mptqc.errors import VerifyError
from mptqc.graph.io import serialize
from mptqc.graph.match import site_of
from mptqc.passes.base import Stage, StageError, run_passes, stage_of
from mptqc.passes.lower_to_cpu import LowerToCpu
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import QuantPlan
from mptqc.recipe import Target
from mptqc.runtime.session import create_session

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]
X = np.random.default_rng(1).normal(size=(3, 7, 12)).astype(np.float32)


def quantized(block: MakeModel, plan: QuantPlan) -> ir.Model:
    return run_passes(block(), [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights()])


def test_every_product_is_lowered_with_its_bias(block: MakeModel, block_plan: MakePlan) -> None:
    model = quantized(block, block_plan())
    result = LowerToCpu()(model)
    assert result.edits == 8
    counts = Counter(node.op_type for node in model.graph)
    assert counts["MatMulIntegerToFloat"] == 8
    assert counts["MatMulInteger"] == 0
    assert counts["Mul"] == 0
    assert [node.name for node in model.graph if node.op_type == "Add" and site_of(node)] == []
    assert counts["Add"] == 3  # the mask, and the two regions of softmax and Gelu
    assert model.opset_imports["com.microsoft"] == 1
    assert stage_of(model) is Stage.LOWERED


def test_outputs_stay_bit_equal(block: MakeModel, block_plan: MakePlan) -> None:
    model = quantized(block, block_plan(6, 5))
    before = create_session(serialize(model), threads=1).run(None, {"x": X})[0]
    LowerToCpu()(model)
    assert np.array_equal(create_session(serialize(model), threads=1).run(None, {"x": X})[0], before)


def test_a_lowered_model_passes_verification(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan(3, target=Target.CPU)
    model = quantized(block, plan)
    LowerToCpu()(model)
    report = verify_compiled(model, plan, X)
    assert report.integer_products == 8
    assert report.float_products == 0


def test_a_product_that_was_edited_is_refused(block: MakeModel, block_plan: MakePlan) -> None:
    model = quantized(block, block_plan())
    cast = next(node for node in model.graph if node.op_type == "Cast" and "product_as_float" in str(node.name))
    cast.op_type = "Identity"
    with pytest.raises(VerifyError, match=r"block00\.q"):
        LowerToCpu()(model)


def test_a_model_that_is_not_quantized_is_refused(block: MakeModel) -> None:
    with pytest.raises(StageError, match="lower-to-cpu"):
        LowerToCpu()(block())
