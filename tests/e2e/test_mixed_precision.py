"""Bits within a budget on the zoo: better than the same number everywhere, sizes as computed, any point of the path."""

import numpy as np
import pytest

from mptqc.analysis.inspect import inspect_model
from mptqc.analysis.pareto import path_points
from mptqc.compiler import apply_plan
from mptqc.graph.io import save_model, serialize
from mptqc.plan import load_plan
from mptqc.runtime.evaluate import evaluate
from tests.e2e.conftest import ZOO

BUDGET = {"average_bits": 4}
# Fewer BLAS threads alone move the SQNR by half a dB (docs/accuracy.md).
NOISE_DB = 0.5


@pytest.fixture(scope="module")
def swin(compile_zoo):
    """Swin at an average of 4 bits."""
    return compile_zoo("swin", None, budget=BUDGET)


def test_better_than_four_bits_everywhere(compile_zoo, zoo_samples, swin):
    test_images = zoo_samples("test")
    uniform, mixed = (
        evaluate(file.path, test_images, reference=ZOO / "swin.onnx", batch=100)
        for file in (compile_zoo("swin", "w4a4"), swin)
    )
    assert mixed.sqnr_db > uniform.sqnr_db + NOISE_DB
    assert mixed.agreement >= uniform.agreement


def test_the_averages_are_kept_by_the_file_itself(swin):
    totals = inspect_model(swin.path).totals
    assert totals.average_weight_bits <= 4
    assert totals.average_activation_bits <= 4
    assert totals.file_bytes == swin.path.stat().st_size
    assert totals.budget_bytes == pytest.approx(totals.file_bytes, rel=0.01)


@pytest.mark.parametrize("at", [7.0, 5.5, 4.5])
def test_every_point_has_the_bytes_that_the_path_says(swin, tmp_path, at):
    compiled = apply_plan(ZOO / "swin.onnx", swin.compiled.plan, at=at)
    path = tmp_path / "point.onnx"
    save_model(compiled.model, path)
    totals = inspect_model(path).totals
    assert max(totals.average_weight_bits, totals.average_activation_bits) <= at
    assert totals.budget_bytes == pytest.approx(path.stat().st_size, rel=0.01)


def test_the_compiled_point_keeps_its_bytes(swin, tmp_path):
    swin.save_plan(tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    end = path_points(plan)[-1]
    at = max(end.average_weight_bits, end.average_activation_bits)
    assert serialize(apply_plan(ZOO / "swin.onnx", plan, at=at).model) == swin.path.read_bytes()
    assert serialize(apply_plan(ZOO / "swin.onnx", plan).model) == swin.path.read_bytes()


def test_samples_compensate_another_point(swin, zoo_samples):
    rounded, compensated = (
        apply_plan(ZOO / "swin.onnx", swin.compiled.plan, at=5.0, samples=samples)
        for samples in (None, zoo_samples("calibration").take(8, 0))
    )
    assert not any(key.endswith("/weight_codes") for key in rounded.plan.arrays)
    assert any(key.endswith("/weight_codes") for key in compensated.plan.arrays)
    assert compensated.plan.layers == rounded.plan.layers


def test_fewer_bytes_by_the_same_arithmetic(compile_zoo):
    file = compile_zoo("vit", None, budget={"max_bytes": 700_000}, **compile_zoo.quick)
    assert file.path.stat().st_size <= 700_000
    assert file.path.stat().st_size > 680_000
    assert np.isfinite(path_points(file.compiled.plan)[-1].loss)
