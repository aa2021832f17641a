"""Scaling the channels after GELU, or of a gated product, changes no output; a missing or scaled GELU is refused."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from gated_blocks import gated

from mptqc.analysis.shapes import concrete_shapes
from mptqc.errors import PlanError
from mptqc.graph.match import find_linears
from mptqc.passes.base import STAGE_KEY, Stage
from mptqc.passes.fold_gelu import FoldGelu
from mptqc.plan import GeluFold, QuantPlan
from mptqc.runtime.session import create_session, run_arrays

FLOAT32_CHAIN = 1e-5
"""Relative to the largest output: a dozen float32 sums of some twenty terms, 6e-8 each, and their growth."""


@pytest.fixture
def folded(block: Callable[[], ir.Model]) -> ir.Model:
    model = block()
    model.metadata_props[STAGE_KEY] = Stage.SMOOTHED
    return model


def fold(model: ir.Model, plan: QuantPlan, site: str = "block00.fc2") -> int:
    width = next(linear for linear in find_linears(model) if linear.site == "block00.fc2").weight.shape[0]
    scale = np.linspace(0.2, 5, width).astype(np.float32)
    plan = plan.model_copy(update={"gelu_folds": (GeluFold(site=site, alpha=0.5),)})
    return int(FoldGelu(plan.with_arrays({f"{site}/input_scale": scale}), concrete_shapes(model))(model).edits)


def run(model: ir.Model) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((2, 7, 12)).astype(np.float32)
    return run_arrays(create_session(ir.to_proto(model).SerializeToString()), ["y"], {"x": x})[0]


def test_the_output_stays(folded: ir.Model, block_plan: Callable[..., QuantPlan]) -> None:
    before = run(folded)
    weights = {linear.site: linear.weight.copy() for linear in find_linears(folded)}
    assert fold(folded, block_plan()) == 1
    np.testing.assert_allclose(run(folded), before, atol=FLOAT32_CHAIN * np.abs(before).max())
    after = {linear.site: linear.weight for linear in find_linears(folded)}
    assert [site for site in weights if not np.array_equal(weights[site], after[site])] == ["block00.fc2"]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_gated_linear_takes_the_scale_in(
    folded: ir.Model, block_plan: Callable[..., QuantPlan], activation: str
) -> None:
    model = gated(folded, activation)
    before, nodes = run(model), len(model.graph)
    weights = {linear.site: linear.weight.copy() for linear in find_linears(model)}
    assert fold(model, block_plan()) == 1
    np.testing.assert_allclose(run(model), before, atol=FLOAT32_CHAIN * np.abs(before).max())
    after = {linear.site: linear.weight for linear in find_linears(model)}
    changed = [site for site in weights if not np.array_equal(weights[site], after[site])]
    assert (changed, len(model.graph)) == (["block00.fc1", "block00.fc2"], nodes)


def test_what_nothing_activates_is_no_gate(folded: ir.Model, block_plan: Callable[..., QuantPlan]) -> None:
    with pytest.raises(PlanError, match=r"block00\.fc2"):
        fold(gated(folded, "none"), block_plan())


@pytest.mark.parametrize("site", ["block00.fc1", "block07.fc2"])
def test_what_reads_no_gelu_is_refused(folded: ir.Model, block_plan: Callable[..., QuantPlan], site: str) -> None:
    with pytest.raises(PlanError, match=site):
        fold(folded, block_plan(), site)


def test_a_second_run_is_refused(folded: ir.Model, block_plan: Callable[..., QuantPlan]) -> None:
    fold(folded, block_plan())
    with pytest.raises(PlanError, match=r"block00\.fc2"):
        fold(folded, block_plan())
