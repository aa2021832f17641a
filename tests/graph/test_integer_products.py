from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.errors import VerifyError
from mptqc.graph.integer_products import find_integer_products, find_sources, stored_weight
from mptqc.graph.match import find_linears
from mptqc.passes.base import run_passes
from mptqc.passes.lower_to_cpu import LowerToCpu
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import QuantPlan
from mptqc.reference.quantizers import quantize_weight

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]


def compiled(block: MakeModel, plan: QuantPlan, *, lowered: bool = False) -> ir.Model:
    passes = [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights(), LowerToCpu()]
    return run_passes(block(), passes if lowered else passes[:-1])


@pytest.mark.parametrize("lowered", [False, True])
def test_products_are_found_written_or_lowered(block: MakeModel, block_plan: MakePlan, lowered: bool) -> None:
    products = find_integer_products(compiled(block, block_plan(), lowered=lowered))
    linears = [product.site for product in products if product.is_linear]
    assert linears == [f"block00.{name}" for name in ("q", "k", "v", "proj", "fc1", "fc2")]
    assert [product.site for product in products if not product.is_linear] == ["block00.attention"] * 2
    assert [product.output.name for product in products if product.site == "block00.fc2"] == ["y"]
    assert all((product.bias is not None) == product.is_linear for product in products)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_stored_weight_is_read_back(block: MakeModel, block_plan: MakePlan, bits: int) -> None:
    plan = block_plan(bits)
    weights = {linear.site: linear.weight for linear in find_linears(block())}
    for product in find_integer_products(compiled(block, plan)):
        if product.is_linear:
            stored = stored_weight(product)
            scale = plan.array(f"{product.site}/weight_scale")
            assert np.array_equal(stored.integers, quantize_weight(weights[product.site], scale, bits))
            assert (stored.bits, stored.stored_bytes) == (bits, stored.integers.size * bits // 8)


def test_sources_are_the_floats_that_are_quantized(block: MakeModel, block_plan: MakePlan) -> None:
    found = {
        product.site: [str(source.x.name) for source in find_sources(product.left)]
        for product in find_integer_products(compiled(block, block_plan()))
        if product.is_linear
    }
    context = found.pop("block00.proj")
    assert context == ["block00.attention/context_scaled_output"]  # above the Transpose and Reshape that join heads
    assert found == {
        **{f"block00.{letter}": ["n"] for letter in "qkv"},
        "block00.fc1": ["o"],
        "block00.fc2": ["g"],
    }


def test_codes_that_nothing_quantized_are_refused(block: MakeModel, block_plan: MakePlan) -> None:
    model = compiled(block, block_plan())
    product = find_integer_products(model)[0]
    with pytest.raises(VerifyError, match="not made by QuantizeLinear"):
        find_sources(product.output)
