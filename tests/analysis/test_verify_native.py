from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes
from mptqc.analysis.verify import verify_compiled
from mptqc.errors import VerifyError
from mptqc.graph.edit import Builder
from mptqc.graph.native_nodes import native_nodes
from mptqc.passes.base import run_passes
from mptqc.passes.lower_to_native import LowerToNative
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import QuantPlan
from mptqc.recipe import Target
from mptqc.runtime.library import find_library

pytestmark = pytest.mark.skipif(find_library() is None, reason="the kernel library was not built: no C++17 compiler")
X = np.random.default_rng(1).normal(size=(3, 7, 12)).astype(np.float32)
MakeNative = Callable[..., tuple[ir.Model, QuantPlan]]


@pytest.fixture
def native(block: Callable[[], ir.Model], block_plan: Callable[..., QuantPlan]) -> MakeNative:
    def make(*bits: int, two_region: bool = True, subtract: bool = False) -> tuple[ir.Model, QuantPlan]:
        plan = block_plan(*bits, two_region=two_region, target=Target.CPU_NATIVE)
        float_model = block()
        if subtract:
            subtract_from_scores(float_model)
        model = run_passes(float_model, [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights()])
        LowerToNative(concrete_shapes(model), concrete_shapes(model, batch=2))(model)
        return model, plan

    return make


def subtract_from_scores(model: ir.Model) -> None:
    """What no native attention does."""
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    build = Builder(softmax, "test")
    one = build.constant("one", np.array(1, np.float32))
    softmax.replace_input_with(0, build.op("Sub", [softmax.inputs[0], one]))


@pytest.mark.parametrize(("bits", "two_region"), [((8, 8), False), ((4, 4), True), ((3, 5), True)])
def test_a_native_model_passes(native: MakeNative, bits: tuple[int, int], two_region: bool) -> None:
    report = verify_compiled(*native(*bits, two_region=two_region), X)
    assert (report.integer_products, report.float_products) == (8, 0)
    assert len(report.sites) == 8
    assert all(check.codes for check in report.sites)


def test_an_attention_in_portable_form_is_checked_too(native: MakeNative) -> None:
    model, plan = native(4, 4, subtract=True)
    assert not any(node.op_type.startswith("Attention") for node in native_nodes(model))
    report = verify_compiled(model, plan, X)
    assert report.integer_products == 8
    assert [check.site for check in report.sites[:2]] == ["block00.attention"] * 2


@pytest.mark.parametrize(
    ("op_type", "attribute"),
    [
        ("LayerNormQuantize", ir.AttrFloat32("output_scale", 0.2)),
        ("LinearQuantize", ir.AttrFloat32("input_scale", 0.2)),
        ("AttentionQuantize", ir.AttrFloat32("p_scale", 0.01)),
        ("AttentionQuantize", ir.AttrInt64s("p_split", [8])),
    ],
)
def test_a_changed_attribute_is_found(native: MakeNative, op_type: str, attribute: ir.Attr) -> None:
    model, plan = native(4, 4)
    node = next(each for each in native_nodes(model) if each.op_type == op_type)
    node.attributes[attribute.name] = attribute
    with pytest.raises(VerifyError, match="do not give what the plan means"):
        verify_compiled(model, plan, X)


def test_a_zero_point_that_is_not_the_codes_own_is_found(native: MakeNative) -> None:
    model, plan = native(4, 4)
    node = next(each for each in native_nodes(model) if each.op_type == "AttentionQuantize")
    node.attributes["k_zero_point"] = ir.AttrInt64("k_zero_point", 3)
    with pytest.raises(VerifyError, match=r"block00\.attention: k_zero_point is 3"):
        verify_compiled(model, plan, X)


def test_a_changed_weight_is_found(native: MakeNative) -> None:
    model, plan = native(8, 8, two_region=False)
    node = next(each for each in native_nodes(model) if each.op_type == "Linear")
    scale = node.inputs[2]
    assert scale is not None and scale.const_value is not None
    scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(1.001), name=scale.name)
    with pytest.raises(VerifyError, match=r"block00\.fc2: the weight scales in the model are not those of the plan"):
        verify_compiled(model, plan, X)


def test_a_missing_site_is_named(native: MakeNative) -> None:
    model, plan = native()
    node = next(each for each in native_nodes(model) if each.op_type == "AttentionQuantize")
    del node.metadata_props["mptqc.site"]
    with pytest.raises(VerifyError, match=r"block00\.attention \(0 of 2\)"):
        verify_compiled(model, plan, X)
