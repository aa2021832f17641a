"""Whole models in the operators of the kernel library: in numpy always, in ONNX Runtime where the library is."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from native_evaluator import compare_with_portable

from mptqc import api
from mptqc.analysis.verify import verify_compiled
from mptqc.compiler import apply_plan
from mptqc.graph.io import save_model, serialize
from mptqc.graph.native_nodes import lowering_report
from mptqc.plan import QuantPlan
from mptqc.recipe import Target
from mptqc.runtime.fused_ops import matmul_counts, optimized_op_counts
from mptqc.runtime.library import find_library
from mptqc.runtime.session import create_session

ZOO = Path(__file__).parents[2] / "zoo"
QUICK = {
    "range_method": "min-max",
    "smoothing": False,
    "attention_folds": False,
    "compensation": False,
    "samples": 8,
}
COMPARED = {
    "vit": {"QuantizePatches": 1, "LayerNormQuantize": 9, "LinearQuantize": 16, "AttentionQuantize": 4, "Linear": 10},
    "deit": {"QuantizePatches": 1, "LayerNormQuantize": 10, "LinearQuantize": 16, "AttentionQuantize": 4, "Linear": 11},
    "swin": {"QuantizePatches": 1, "LayerNormQuantize": 9, "LinearQuantize": 16, "AttentionQuantize": 4, "Linear": 11},
}
NOT_LOWERED = {
    "vit": [],
    "deit": [],
    "swin": [  # the norm of the patches begins the residual stream, the last one is averaged
        ("norm00", "its floats are read by LayerNormalization /stage1/stage1.0/norm1/LayerNormalization"),
        ("norm01", "its floats are read by ReduceMean /ReduceMean"),
    ],
}
needs_library = pytest.mark.skipif(find_library() is None, reason="the kernel library was not built: no C++17 compiler")


def for_native(plan: QuantPlan) -> QuantPlan:
    return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"target": Target.CPU_NATIVE})})


@pytest.mark.parametrize("model", COMPARED)
def test_every_operator_gives_the_portable_values(compile_zoo, zoo_samples, model):
    path = compile_zoo(model, "w4a4", **QUICK).path
    native = api.lower(path).model
    images = next(zoo_samples("test").batches(2))
    assert compare_with_portable(native, ir.load(path), {"images": images}) == COMPARED[model]
    assert [(each.site, each.reason) for each in lowering_report(native) if each.reason] == NOT_LOWERED[model]


@pytest.mark.parametrize("head", ["class", "distilled", "mean", "dense"])
def test_a_tiny_vit_of_fixed_batch(tiny_vit, tmp_path, head):
    save_model(tiny_vit(head, batch="2"), tmp_path / "tiny.onnx")
    images = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images)
    compiled = api.compile(tmp_path / "tiny.onnx", tmp_path / "images.npz", preset="w4a8", options=QUICK)
    compiled.save(tmp_path / "portable.onnx")
    native = api.lower(tmp_path / "portable.onnx").model
    compared = compare_with_portable(native, compiled.model, {"images": images[:2]})
    assert compared["AttentionQuantize"] == 2


def test_lowering_a_file_gives_what_compile_gives(compile_zoo):
    file = compile_zoo("vit", "w4a4", **QUICK)
    compiled = apply_plan(ZOO / "vit.onnx", for_native(file.compiled.plan))
    assert serialize(api.lower(file.path).model) == serialize(compiled.model)


@needs_library
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", COMPARED)
def test_the_library_gives_what_the_plan_means(compile_zoo, zoo_samples, model, batch):
    file = compile_zoo(model, "w4a4", **QUICK)
    native = api.lower(file.path).model
    plan = for_native(file.compiled.plan)
    report = verify_compiled(native, plan, next(zoo_samples("test").batches(batch)))
    assert report.integer_products == len(plan.layers) + 2 * len(plan.attentions)
    assert report.float_products == 0


@needs_library
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", COMPARED)
def test_a_fixed_batch_gives_what_a_dynamic_one_does(compile_zoo, zoo_samples, tmp_path, model, batch):
    path = compile_zoo(model, "w8a8", **QUICK).path
    images = next(zoo_samples("test").batches(batch))
    dynamic = serialize(api.lower(path).model)
    fixed_model = onnx.load(path)
    fixed_model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(fixed_model, tmp_path / "fixed.onnx")
    fixed = serialize(api.lower(tmp_path / "fixed.onnx").model)
    outputs = [create_session(each, threads=1).run(None, {"images": images})[0] for each in (dynamic, fixed)]
    assert np.array_equal(*outputs)


@needs_library
def test_every_product_is_an_operator_of_the_library(compile_zoo, tmp_path):
    file = compile_zoo("swin", "w4a4", **QUICK)
    api.lower(file.path).save(tmp_path / "native.onnx")
    counts = optimized_op_counts(tmp_path / "native.onnx")
    plan = file.compiled.plan
    assert matmul_counts(counts).integer_matmuls == len(plan.layers) + 2 * len(plan.attentions)
    assert {"MatMulInteger", "MatMulIntegerToFloat", "MatMul", "Gemm"}.isdisjoint(counts)


@needs_library
def test_threads_do_not_change_a_bit(compile_zoo, zoo_samples):
    native = serialize(api.lower(compile_zoo("swin", "w4a4", **QUICK).path).model)
    images = next(zoo_samples("test").batches(3))
    outputs = [create_session(native, threads=threads).run(None, {"images": images})[0] for threads in (1, 2)]
    assert np.array_equal(*outputs)


@needs_library
def test_compile_verifies_a_native_model(tmp_path):
    result = api.compile(
        ZOO / "vit.onnx",
        ZOO / "calibration.npz",
        preset="w4a4",
        preprocess=str(ZOO / "preprocess.json"),
        options={**QUICK, "target": "cpu-native"},
    )
    assert result.report.checks is not None
    assert result.report.checks.integer_products == 34


def test_without_the_library_a_native_model_is_compiled_and_not_verified(monkeypatch, caplog):
    monkeypatch.setattr(api, "find_library", lambda: None)
    options = {**QUICK, "target": "cpu-native"}
    result = api.compile(
        ZOO / "vit.onnx",
        ZOO / "calibration.npz",
        preset="w8a8",
        preprocess=str(ZOO / "preprocess.json"),
        options=options,
    )
    assert result.report.checks is None
    assert result.report.fidelity is not None
    assert "not verified: the kernel library is not there" in caplog.text
