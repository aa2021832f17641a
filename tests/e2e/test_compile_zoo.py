"""Real models, whole compiles: accuracy, what runs, size, and that the same input gives the same bytes."""

from pathlib import Path

import numpy as np
import pytest

from mptqc.compiler import apply_plan, compile_model, load_canonical
from mptqc.data.preprocess import from_metadata
from mptqc.data.preprocess_sources import load_preprocessing
from mptqc.errors import ModelError, PlanError, RecipeError
from mptqc.graph.compiled_file import load_compiled
from mptqc.graph.integer_products import find_integer_products, stored_weight
from mptqc.graph.io import load_model, serialize
from mptqc.graph.match import find_linears
from mptqc.plan import load_plan, save_plan
from mptqc.recipe import Target
from mptqc.runtime.evaluate import evaluate
from mptqc.runtime.fused_ops import matmul_counts, optimized_op_counts
from mptqc.runtime.machine import saturates_here
from mptqc.runtime.model_files import model_file_bytes
from mptqc.runtime.session import create_session

ZOO = Path(__file__).parents[2] / "zoo"
MODELS = [path.stem for path in sorted(ZOO.glob("*.onnx"))]
# Points of top-1 that may be lost with 64 calibration images; what the project promises for its zoo.
MOST_LOST = {"w8a8": 0.003, "w6a6": 0.005, "w4a4": 0.02}
EVALUATION_BATCH = 100
FEW_SAMPLES = 8
# Packed weights come with tables of at most 2 KB a plane and with the few ops, named, that widen each of 24 weights.
WIDENING_BYTES = 8 * 2048 + 24 * 8 * 600


@pytest.mark.parametrize(
    ("model", "preset"), [*((model, "w4a4") for model in MODELS), ("vit", "w6a6"), ("vit", "w8a8")]
)
def test_accuracy_lost(compile_zoo, zoo_samples, model, preset):
    test_images = zoo_samples("test")
    path = compile_zoo(model, preset).path
    float_top1 = evaluate(ZOO / f"{model}.onnx", test_images, batch=EVALUATION_BATCH).top1
    assert evaluate(path, test_images, batch=EVALUATION_BATCH).top1 >= float_top1 - MOST_LOST[preset]


@pytest.mark.parametrize("model", MODELS)
def test_every_product_runs_in_integers(compile_zoo, model):
    file = compile_zoo(model, "w4a4")
    plan = file.compiled.plan
    counts = matmul_counts(optimized_op_counts(file.path))
    assert counts.integer_matmuls == len(plan.layers) + 2 * len(plan.attentions)
    assert counts.float_matmuls == 0


def test_no_pair_of_products_passes_16_bits(compile_zoo):
    file = compile_zoo("vit", "w8a8", **compile_zoo.quick)
    plan = file.compiled.plan
    assert {layer.weight_bits for layer in plan.layers} == {7}
    assert {layer.input.bits for layer in plan.layers} == {8}
    linears = [product for product in find_integer_products(load_compiled(file.path)[0]) if product.is_linear]
    assert len(linears) == len(plan.layers)
    assert {int(stored_weight(product).integers.max()) for product in linears} == {63}
    for attention in plan.attentions:
        assert [getattr(attention, operand).bits for operand in "qkpv"] == [8, 7, 8, 7]


def test_the_full_range_is_refused_where_it_would_saturate(compile_zoo, monkeypatch):
    monkeypatch.setattr("mptqc.compiler.saturates_here", lambda: True)
    with pytest.raises(RecipeError, match="AVX2 without VNNI"):
        compile_zoo("vit", "w8a8", reduce_range=False, **compile_zoo.quick)


@pytest.mark.skipif(saturates_here(), reason="8-bit products saturate on this machine")
def test_the_full_range_uses_it(compile_zoo):
    plan = compile_zoo("vit", "w8a8", reduce_range=False, **compile_zoo.quick).compiled.plan
    assert {layer.weight_bits for layer in plan.layers} == {8}
    assert {attention.k.bits for attention in plan.attentions} == {8}


def test_cpu_target_gives_the_same_numbers(compile_zoo, zoo_samples):
    images = next(zoo_samples("test").batches(8))
    file = compile_zoo("vit", "w4a4")
    plan = file.compiled.plan
    plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"target": Target.CPU})})
    lowered = serialize(apply_plan(ZOO / "vit.onnx", plan).model)
    outputs = [create_session(model, threads=1).run(None, {"images": images})[0] for model in (file.path, lowered)]
    assert np.array_equal(*outputs)


def test_cpu_target_compiles(compile_zoo):
    compiled = compile_zoo("vit", "w8a8", target="cpu", **compile_zoo.quick).compiled
    assert {node.domain for node in compiled.model.graph} == {"", "com.microsoft"}


def test_portable_target_is_standard_onnx(compile_zoo):
    assert {node.domain for node in compile_zoo("vit", "w4a4").compiled.model.graph} == {""}


def test_batch_does_not_change_an_image(compile_zoo, zoo_samples):
    session = create_session(compile_zoo("vit", "w4a4").path, threads=1)
    images = next(zoo_samples("test").batches(5))
    together = session.run(None, {"images": images})[0]
    alone = np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])
    # Float32 sums in LayerNorm and softmax may be ordered otherwise, and one flipped code moves a logit by about a
    # step of the head's input times a weight: far below 1 here, where logits reach 10.
    assert np.abs(together - alone).max() < 0.5


@pytest.mark.parametrize("bits", [6, 4, 3])
def test_weights_take_their_bits_in_the_file(compile_zoo, bits):
    linears = find_linears(load_canonical(ZOO / "vit.onnx"))
    weights = sum(linear.weight.size for linear in linears if linear.site.startswith("block"))
    saved = model_file_bytes(compile_zoo("vit", "w8a8", **compile_zoo.quick).path) - model_file_bytes(
        compile_zoo("vit", "w8a8", weight_bits=bits, **compile_zoo.quick).path
    )
    expected = weights * (8 - bits) / 8
    assert expected - WIDENING_BYTES < saved <= expected


def test_compiling_twice_gives_the_same_bytes(compile_zoo, zoo_samples):
    first = compile_zoo("vit", "w4a4", samples=FEW_SAMPLES)
    again = compile_model(
        ZOO / "vit.onnx",
        zoo_samples("calibration"),
        first.compiled.plan.recipe,
        preprocess=load_preprocessing(ZOO / "preprocess.json").to_json(),
    )
    assert serialize(again.model) == first.path.read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_plan_from_disk_gives_the_same_bytes(compile_zoo, tmp_path, model):
    file = compile_zoo(model, "w4a4")
    save_plan(file.compiled.plan, tmp_path / "plan.json")
    applied = apply_plan(ZOO / f"{model}.onnx", load_plan(tmp_path / "plan.json"))
    assert serialize(applied.model) == file.path.read_bytes()


def test_plan_of_another_model_is_refused(compile_zoo, tmp_path):
    other = tmp_path / "other.onnx"
    model = load_model(ZOO / "vit.onnx")
    model.doc_string = "not the same file"
    other.write_bytes(serialize(model))
    with pytest.raises(PlanError, match="another model"):
        apply_plan(other, compile_zoo("vit", "w4a4").compiled.plan)


def test_compiled_model_knows_its_preprocessing(compile_zoo):
    properties = compile_zoo("vit", "w4a4").compiled.model.metadata_props
    assert from_metadata(properties) == load_preprocessing(ZOO / "preprocess.json")


def test_compiled_model_is_not_compiled_again(compile_zoo):
    with pytest.raises(ModelError, match="already compiled"):
        load_model(compile_zoo("vit", "w4a4").path)
