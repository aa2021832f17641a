from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from mptqc.analysis.verify import verify_compiled
from mptqc.errors import VerifyError
from mptqc.graph.edit import constant_of
from mptqc.graph.integer_products import find_integer_products
from mptqc.graph.io import save_model
from mptqc.passes.base import run_passes
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import QuantPlan
from mptqc.reference.quantizers import integer_linear

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]
X = np.random.default_rng(1).normal(size=(3, 7, 12)).astype(np.float32)


def compiled(block: MakeModel, plan: QuantPlan) -> ir.Model:
    return run_passes(block(), [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights()])


def set_constant(value: ir.Value | None, factor: float) -> None:
    """Multiply an initializer in place."""
    array = constant_of(value)
    assert value is not None and array is not None
    value.const_value = ir.tensor((array * factor).astype(array.dtype), name=value.name)


@pytest.mark.parametrize(
    ("weight_bits", "bits", "two_region"), [(4, 4, True), (3, 5, True), (8, 8, False), (2, 6, False)]
)
def test_a_compiled_block_passes(
    block: MakeModel, block_plan: MakePlan, weight_bits: int, bits: int, two_region: bool
) -> None:
    plan = block_plan(weight_bits, bits, two_region=two_region)
    report = verify_compiled(compiled(block, plan), plan, X)
    assert (report.integer_products, report.float_products, len(report.sites)) == (8, 0, 8)
    assert all(check.fused and check.code_mismatches == 0 and check.codes > 0 for check in report.sites)
    assert report.op_counts["MatMulIntegerToFloat"] == 8
    assert report.worst in {check.site for check in report.sites}


def test_a_file_is_verified_too(block: MakeModel, block_plan: MakePlan, tmp_path: Path) -> None:
    plan = block_plan()
    save_model(compiled(block, plan), tmp_path / "out.onnx")
    assert verify_compiled(tmp_path / "out.onnx", plan, X).integer_products == 8


def test_floats_that_are_planned_so_are_counted(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan().model_copy(update={"attentions": ()})
    report = verify_compiled(compiled(block, plan), plan, X)
    assert (report.integer_products, report.float_products) == (6, 2)


def test_codes_of_another_scale_are_found(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan()
    model = compiled(block, plan)
    product = next(each for each in find_integer_products(model) if each.site == "block00.fc1")
    set_constant(product.left_scale, 1.1)
    with pytest.raises(VerifyError, match=r"1 of 8 integer products .* the worst is block00\.fc1 \("):
        verify_compiled(model, plan, X)


def test_codes_of_another_zero_point_are_found(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan(8, 8, two_region=False)
    other = plan.layers[0].input.model_copy(update={"zero_point": 0})
    layers = (plan.layers[0].model_copy(update={"input": other}), *plan.layers[1:])
    with pytest.raises(VerifyError, match=r"the worst is block00\.q"):
        verify_compiled(compiled(block, plan), plan.model_copy(update={"layers": layers}), X)


def test_a_difference_beyond_rounding_is_an_error(
    block: MakeModel, block_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slightly_wrong(*arguments: Any) -> NDArray[np.float32]:
        return integer_linear(*arguments) * np.float32(1 + 2e-6)

    plan = block_plan()
    model = compiled(block, plan)
    monkeypatch.setattr("mptqc.analysis.verify.integer_linear", slightly_wrong)
    with pytest.raises(VerifyError, match="6 of 8 integer products"):
        verify_compiled(model, plan, X)


def test_weights_of_another_plan_are_found(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan()
    model = compiled(block, plan)
    scale = plan.array("block00.fc1/weight_scale")
    with pytest.raises(VerifyError, match=r"block00\.fc1: the weight scales"):
        verify_compiled(model, plan.with_arrays({"block00.fc1/weight_scale": scale * np.float32(1.01)}), X)
    with pytest.raises(VerifyError, match=r"block00\.fc1: the weight codes"):
        verify_compiled(model, plan.with_arrays({"block00.fc1/weight_codes": np.zeros((12, 20), np.int8)}), X)


def test_a_product_that_runs_in_floats_is_named(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan()
    with pytest.raises(VerifyError, match=r"7 planned sites .* block00\.attention \(0 of 2\), block00\.fc1 \(0 of 1\)"):
        verify_compiled(block(), plan, X)
