"""Full coverage of real models: every tensor between the products is quantized, and nothing else changes."""

import json
from pathlib import Path

import numpy as np
import pytest

from mptqc import api
from mptqc.analysis.inspect import inspect_model
from mptqc.analysis.verify import verify_compiled
from mptqc.cli.app import main
from mptqc.compiler import apply_plan, compile_model, load_canonical
from mptqc.errors import RecipeError
from mptqc.graph.io import serialize
from mptqc.graph.native_nodes import lowering_report
from mptqc.graph.tensors import find_tensors
from mptqc.plan import load_plan, save_plan
from mptqc.recipe import Target, make_recipe
from mptqc.runtime.evaluate import evaluate
from mptqc.runtime.library import find_library
from mptqc.runtime.session import create_session

ZOO = Path(__file__).parents[2] / "zoo"
MODELS = [path.stem for path in sorted(ZOO.glob("*.onnx"))]
QUICK = {
    "range_method": "min-max",
    "smoothing": False,
    "attention_folds": False,
    "opt_m": False,
    "compensation": False,
    "samples": 8,
    "coverage": "full",
}
MOST_LOST = 0.005  # of top-1 at W8A8
LEAST_DECIBELS = 30.0
# One code that a float sum at a tie flips is a step of the head's input times a weight: far below 1, logits reach 10.
ONE_CODE = 0.5


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_is_quantized_and_every_product_an_integer_one(compile_zoo, zoo_samples, model):
    file = compile_zoo(model, "w8a8", **QUICK)
    plan = file.compiled.plan
    assert [each.site for each in plan.tensors] == [
        tensor.site for tensor in find_tensors(load_canonical(ZOO / f"{model}.onnx")).found
    ]
    report = verify_compiled(file.path, plan, next(zoo_samples("test").batches(2)))
    assert (report.integer_products, report.float_products) == (len(plan.layers) + 2 * len(plan.attentions), 0)
    assert len(report.tensors) == len(plan.tensors)
    assert not [op for op in report.op_counts if "QLinear" in op]
    assert {refusal.what for refusal in plan.refusals if refusal.site.startswith("head")} == {"full coverage"}


@pytest.mark.parametrize("model", MODELS)
def test_graph_optimization_changes_rounding_only(compile_zoo, zoo_samples, model):
    path = compile_zoo(model, "w8a8", **QUICK).path
    images = next(zoo_samples("test").batches(4))
    sessions = [create_session(path, threads=1, graph_optimization=optimized) for optimized in (False, True)]
    plain, optimized = (session.run(None, {"images": images})[0] for session in sessions)
    assert np.abs(plain - optimized).max() < ONE_CODE


def test_accuracy_at_8_bits(compile_zoo, zoo_samples):
    test_images = zoo_samples("test")
    float_top1 = evaluate(ZOO / "vit.onnx", test_images, batch=100).top1
    found = evaluate(
        compile_zoo("vit", "w8a8", coverage="full").path, test_images, reference=ZOO / "vit.onnx", batch=100
    )
    assert found.top1 >= float_top1 - MOST_LOST
    assert found.sqnr_db > LEAST_DECIBELS


@pytest.mark.parametrize("model", MODELS)
def test_plan_from_disk_gives_the_same_bytes(compile_zoo, tmp_path, model):
    options = {**QUICK, "range_method": "mse"}  # so that exponents compete, and are in the plan where they win
    file = compile_zoo(model, "w4a4", **options)
    save_plan(file.compiled.plan, tmp_path / "plan.json")
    applied = apply_plan(ZOO / f"{model}.onnx", load_plan(tmp_path / "plan.json"))
    assert serialize(applied.model) == file.path.read_bytes()
    written = json.loads((tmp_path / "plan.json").read_text())["tensors"]
    assert [each["site"] for each in written] == [each.site for each in file.compiled.plan.tensors]


def test_partial_coverage_has_no_tensors(compile_zoo):
    assert compile_zoo("vit", "w8a8", **{**QUICK, "coverage": "partial"}).compiled.plan.tensors == ()


def test_recipe_patterns_set_the_bits_of_tensors(compile_zoo, zoo_samples):
    sites = {"block0[01].fc1.output": {"activation_bits": 5}, "*.scores": {"activation_bits": 6}}
    recipe = make_recipe("w8a8", options={**QUICK, "sites": sites})
    plan = compile_model(ZOO / "vit.onnx", zoo_samples("calibration"), recipe).plan
    bits = {each.site: each.quantizer.bits for each in plan.tensors}
    assert [bits[f"block0{block}.fc1.output"] for block in range(4)] == [5, 5, 8, 8]
    assert bits["block00.attention.scores"] == 6


@pytest.mark.parametrize(("coverage", "pattern"), [("full", "block00.fc1.input"), ("partial", "block00.fc1.output")])
def test_a_pattern_of_no_tensor_is_an_error(zoo_samples, coverage, pattern):
    recipe = make_recipe("w8a8", options={**QUICK, "coverage": coverage, "sites": {pattern: {"activation_bits": 4}}})
    with pytest.raises(RecipeError, match=pattern):
        compile_model(ZOO / "vit.onnx", zoo_samples("calibration"), recipe)


def test_inspect_lists_tensors(compile_zoo):
    file = compile_zoo("vit", "w8a8", **QUICK)
    found = inspect_model(file.path)
    rows = [row for row in found.layers if row.kind == "tensor"]
    assert {row.site for row in rows} == {each.site for each in file.compiled.plan.tensors}
    assert found.totals.quantized_tensors == len(rows)
    order = [row.site for row in found.layers]
    assert order.index("block00.norm1.input") < order.index("block00.q") < order.index("block00.attention.scores")


@pytest.mark.parametrize("model", MODELS)
def test_the_cpu_target_gives_the_same_numbers(compile_zoo, zoo_samples, model):
    file = compile_zoo(model, "w8a8", **QUICK)
    plan = file.compiled.plan
    plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"target": Target.CPU})})
    lowered = serialize(apply_plan(ZOO / f"{model}.onnx", plan).model)
    images = next(zoo_samples("test").batches(4))
    outputs = [create_session(each, threads=1).run(None, {"images": images})[0] for each in (file.path, lowered)]
    assert np.array_equal(*outputs)


def test_the_native_target_says_what_stays_portable(compile_zoo):
    native = api.lower(compile_zoo("vit", "w8a8", **QUICK).path).model
    refused = {each.site: each for each in lowering_report(native) if each.reason}
    assert refused["block00.fc1"].reason == "what its GELU reads is quantized"
    assert "lies between its scores and their softmax" in refused["block00.attention"].reason


@pytest.mark.skipif(find_library() is None, reason="the kernel library was not built: no C++17 compiler")
@pytest.mark.parametrize("model", MODELS)
def test_the_library_gives_what_the_plan_means(compile_zoo, zoo_samples, model):
    file = compile_zoo(model, "w8a8", **QUICK)
    plan = file.compiled.plan
    plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"target": Target.CPU_NATIVE})})
    native = api.lower(file.path).model
    report = verify_compiled(native, plan, next(zoo_samples("test").batches(2)))
    assert report.integer_products == len(plan.layers) + 2 * len(plan.attentions)
    assert len(report.tensors) == len(plan.tensors)


def test_the_command_line_says_what_was_done(tmp_path, capsys):
    arguments = ["compile", ZOO / "vit.onnx", "-o", tmp_path / "out.onnx", "--calibration", ZOO / "calibration.npz"]
    arguments += ["--preprocess", ZOO / "preprocess.json", "--coverage", "full", "--samples", 8, "--no-compensation"]
    arguments += ["--range-method", "min-max", "--no-smoothing", "--no-attention-folds", "--no-opt-m"]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert not ended.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "26 tensors between them are quantized too" in text
    assert "left alone: full coverage at head.output: it stays float: only the model's output" in text
