"""Weights that a trellis codes, in whole compiles: what runs, what it brings, bytes, budgets."""

import numpy as np
import pytest

from mptqc.analysis.inspect import inspect_model
from mptqc.analysis.pareto import path_points
from mptqc.analysis.verify import verify_compiled
from mptqc.compiler import apply_plan, lower_compiled
from mptqc.graph.io import save_model, serialize
from mptqc.plan import load_plan
from mptqc.recipe import Target
from mptqc.runtime.evaluate import evaluate
from mptqc.runtime.fused_ops import matmul_counts, optimized_op_counts
from mptqc.runtime.library import find_library
from mptqc.runtime.session import create_session
from tests.e2e.conftest import ZOO

GAINED_DB = 1.5
"""Half of what docs/accuracy.md reports, whose figures may be half a dB off."""


@pytest.fixture(scope="module")
def compiled(compile_zoo):
    return compile_zoo("vit", "w3a8")


def test_it_is_nearer_to_float_than_uniform_codes_of_as_many_bits(compile_zoo, zoo_samples, compiled):
    uniform = compile_zoo("vit", "w3a8", trellis=False)
    by_trellis, without = (
        evaluate(file.path, zoo_samples("test"), reference=ZOO / "vit.onnx", batch=100) for file in (compiled, uniform)
    )
    assert by_trellis.sqnr_db > without.sqnr_db + GAINED_DB
    sizes = [inspect_model(file.path).totals.weight_bytes for file in (compiled, uniform)]
    assert sizes[0] == sizes[1]


def test_every_product_runs_in_integers_and_the_plan_tells_what_is_stored(compiled, zoo_samples):
    counts = matmul_counts(optimized_op_counts(compiled.path))
    assert (counts.integer_matmuls, counts.float_matmuls) == (34, 0)
    rows = [row for row in inspect_model(compiled.path).layers if row.kind == "linear"]
    assert {row.site for row in rows if not row.trellis} == {"patch_embed", "head"}
    assert {row.weight_bits for row in rows if row.trellis} == {3}
    images = next(zoo_samples("test").batches(2))
    verify_compiled(compiled.compiled.model, compiled.compiled.plan, images)


def test_the_plan_rebuilds_the_same_bytes(compiled, tmp_path):
    compiled.save_plan(tmp_path / "plan.json")
    again = apply_plan(ZOO / "vit.onnx", load_plan(tmp_path / "plan.json"))
    assert serialize(again.model) == compiled.path.read_bytes()


@pytest.mark.skipif(find_library() is None, reason="the kernel library was not built: no C++17 compiler")
def test_the_kernel_library_gives_the_same(compiled, zoo_samples, tmp_path):
    lowered = lower_compiled(compiled.path, Target.CPU_NATIVE)
    save_model(lowered.model, tmp_path / "native.onnx")
    images = next(zoo_samples("test").batches(50))
    one, other = (
        create_session(path, threads=1).run(None, {"images": images})[0]
        for path in (compiled.path, tmp_path / "native.onnx")
    )
    # LayerNorm, GELU and softmax may flip a code at a rounding boundary; nothing else may differ.
    assert np.square(one - other).sum() < 1e-4 * np.square(one).sum()
    stored = [
        {row.site: row.weight_bytes for row in inspect_model(path).layers if row.trellis}
        for path in (compiled.path, tmp_path / "native.onnx")
    ]
    assert stored[0]
    assert stored[0] == stored[1]


def test_a_budget_counts_its_bytes_and_any_point_can_be_emitted(compile_zoo, tmp_path):
    file = compile_zoo("vit", None, trellis=True, budget={"average_weight_bits": 3}, **compile_zoo.quick)
    totals = inspect_model(file.path).totals
    assert totals.average_weight_bits <= 3
    assert totals.budget_bytes == pytest.approx(totals.file_bytes, rel=0.01)
    path = tmp_path / "point.onnx"
    save_model(apply_plan(ZOO / "vit.onnx", file.compiled.plan, at=4.0).model, path)
    point = inspect_model(path)
    assert 3 < point.totals.average_weight_bits <= 4
    assert {row.trellis for row in point.layers if row.weight_bits and row.weight_bits <= 5} == {True}
    assert not any(row.trellis for row in point.layers if row.weight_bits and row.weight_bits > 5)
    assert point.totals.budget_bytes == pytest.approx(path.stat().st_size, rel=0.01)
    assert path_points(file.compiled.plan)[0].bytes > path.stat().st_size


def test_it_works_without_compensation(compile_zoo, zoo_samples):
    images = zoo_samples("test").take(500, 0)
    nearest, uniform = (
        evaluate(
            compile_zoo("vit", "w3a8", trellis=trellis, compensation=False).path, images,
            reference=ZOO / "vit.onnx", batch=100,
        )
        for trellis in (True, False)
    )  # fmt: skip
    assert nearest.sqnr_db > uniform.sqnr_db + GAINED_DB
