"""Sequential compensation on a tiny ViT: where drift is repaired, and that the output gets nearer to float."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.compensate import compensate, find_residual
from mptqc.analysis.fidelity import measure_fidelity
from mptqc.analysis.planner import plan_quantizers
from mptqc.analysis.shapes import concrete_shapes
from mptqc.compiler import fold, load_canonical, quantize, silent
from mptqc.data.arrays import Arrays, ArraySource
from mptqc.data.samples import Samples
from mptqc.graph.io import save_model
from mptqc.graph.match import find_linears
from mptqc.passes.base import STAGE_KEY
from mptqc.plan import QuantPlan
from mptqc.recipe import Coverage, Recipe
from mptqc.reference.quantizers import weight_limits
from tests.conftest import MakeViT

BITS = 3


@pytest.fixture(scope="module")
def samples() -> Samples:
    images = np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32)
    return Samples(ArraySource(Arrays(images, None, "test"), None), range(96), None)


@pytest.fixture(scope="module")
def smoothed_vit(tiny_vit: MakeViT, tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    path = Path(tmp_path_factory.mktemp("vit")) / "vit.onnx"
    model = tiny_vit("mean")
    model.metadata_props.pop(STAGE_KEY, None)
    save_model(model, path)
    canonical = load_canonical(path)
    fold(canonical, QuantPlan(model_digest="0", recipe=Recipe()))
    return canonical


@pytest.fixture(scope="module")
def plan(smoothed_vit: ir.Model, samples: Samples) -> QuantPlan:
    recipe = Recipe(weight_bits=BITS, activation_bits=8, compensation=False)
    empty = QuantPlan(model_digest="0", recipe=recipe)
    return plan_quantizers(smoothed_vit, concrete_shapes(smoothed_vit), samples, empty, silent)


@pytest.fixture(scope="module")
def compensated(smoothed_vit: ir.Model, samples: Samples, plan: QuantPlan) -> QuantPlan:
    return compensate(smoothed_vit, concrete_shapes(smoothed_vit), samples, plan, quantize, silent)


def quantized(model: ir.Model, plan: QuantPlan) -> ir.Model:
    copy = ir.from_proto(ir.to_proto(model))
    quantize(copy, plan)
    return copy


def test_branches_that_enter_the_stream_have_a_residual(smoothed_vit: ir.Model) -> None:
    shapes = concrete_shapes(smoothed_vit)
    with_residual = {linear.site for linear in find_linears(smoothed_vit) if find_residual(linear, shapes) is not None}
    assert with_residual == {f"block0{block}.{part}" for block in (0, 1) for part in ("proj", "fc2")}


def test_every_planned_linear_gets_codes_scale_and_bias(compensated: QuantPlan) -> None:
    low, high = weight_limits(BITS)
    for layer in compensated.layers:
        codes = compensated.arrays[f"{layer.site}/weight_codes"]
        width = codes.shape[1]
        assert codes.dtype == np.int8
        assert compensated.arrays[f"{layer.site}/weight_scale"].shape == (width,)
        assert compensated.arrays[f"{layer.site}/bias"].shape == (width,)
        if layer.weight_bits == BITS:
            assert codes.min() >= low
            assert codes.max() <= high


def test_the_model_itself_is_not_changed(smoothed_vit: ir.Model, samples: Samples, plan: QuantPlan) -> None:
    before = ir.to_proto(smoothed_vit).SerializeToString(deterministic=True)
    compensate(smoothed_vit, concrete_shapes(smoothed_vit), samples, plan, quantize, silent)
    assert ir.to_proto(smoothed_vit).SerializeToString(deterministic=True) == before


def test_output_is_nearer_to_float(
    smoothed_vit: ir.Model, samples: Samples, plan: QuantPlan, compensated: QuantPlan
) -> None:
    nearest = measure_fidelity(smoothed_vit, quantized(smoothed_vit, plan), samples, 0).sqnr_db
    better = measure_fidelity(smoothed_vit, quantized(smoothed_vit, compensated), samples, 0).sqnr_db
    assert nearest is not None
    assert better is not None
    assert better > nearest + 1.0


def test_tensors_of_full_coverage_are_quantized_before_the_first_linear(
    smoothed_vit: ir.Model, samples: Samples
) -> None:
    recipe = Recipe(weight_bits=BITS, activation_bits=4, compensation=False, coverage=Coverage.FULL)
    shapes = concrete_shapes(smoothed_vit)
    plan = plan_quantizers(smoothed_vit, shapes, samples, QuantPlan(model_digest="0", recipe=recipe), silent)
    calls = []

    def quantize_and_note(model: ir.Model, part: QuantPlan) -> None:
        calls.append((len(part.tensors), len(part.layers)))
        quantize(model, part)

    compensated = compensate(smoothed_vit, shapes, samples, plan, quantize_and_note, silent)
    assert calls[0] == (len(plan.tensors), 0)
    assert len(plan.tensors) > 0
    assert all(tensors == 0 for tensors, _ in calls[1:])
    assert sum(layers for _, layers in calls) == len(plan.layers)
    nearest = measure_fidelity(smoothed_vit, quantized(smoothed_vit, plan), samples, 0).sqnr_db
    better = measure_fidelity(smoothed_vit, quantized(smoothed_vit, compensated), samples, 0).sqnr_db
    assert nearest is not None
    assert better is not None
    assert better > nearest


def test_poorest_linear_comes_first(smoothed_vit: ir.Model, samples: Samples, plan: QuantPlan) -> None:
    rates = [rate for _, rate in measure_fidelity(smoothed_vit, quantized(smoothed_vit, plan), samples, 0).sites]
    assert rates == sorted(rates)
    assert len(rates) == len(plan.layers)
