import logging
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from mptqc.data.arrays import Arrays, ArraySource
from mptqc.data.samples import Samples
from mptqc.errors import DataError, ModelError, RecipeError, VerifyError
from mptqc.runtime.evaluate import MAX_SQNR_DB, Evaluation, evaluate, sqnr_db

CLASSES = 6
SIDE = 2
FEATURES = 3 * SIDE * SIDE

# float32 results against float64 sums of the same values: below 1e-6 relative, 10·log10 of which is under 1e-5 dB
DB_TOLERANCE = 1e-5


def make_samples(images: np.ndarray, labels: np.ndarray | None = None, label_names=None) -> Samples:
    source = ArraySource(Arrays(images.astype(np.float32), labels, "test"), None)
    return Samples(source, range(len(images)), labels, label_names)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(11, 3, SIDE, SIDE)).astype(np.float32)


@pytest.fixture
def classifier(save_nodes):
    """classifier(weight [FEATURES, classes], batch) → the path of images → Flatten → MatMul."""

    def save(weight: np.ndarray, *, batch: str | int = "batch", name: str = "classifier.onnx") -> Path:
        return save_nodes(
            name,
            [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
            [("x", [batch, 3, SIDE, SIDE])],
            [("y", [batch, weight.shape[1]])],
            {"w": weight.astype(np.float32)},
        )

    return save


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(FEATURES, CLASSES)).astype(np.float32)


@pytest.fixture
def dense(save_nodes) -> Path:
    """y = 2x, of the image's shape."""
    return save_nodes(
        "dense.onnx",
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [("x", ["batch", 3, SIDE, SIDE])],
        [("y", ["batch", 3, SIDE, SIDE])],
        {},
    )


def test_top1_and_top5(classifier, weight, images):
    """Labels at known ranks: 5 images at rank 0, 4 at rank 4, 2 at rank 5 (the last)."""
    logits = images.reshape(len(images), -1) @ weight
    ranks = np.array([0] * 5 + [4] * 4 + [5] * 2)
    labels = np.take_along_axis(np.argsort(-logits, axis=1), ranks[:, None], axis=1)[:, 0]
    result = evaluate(classifier(weight), make_samples(images, labels), batch=4)
    assert result == Evaluation(top1=5 / 11, top5=9 / 11, agreement=None, sqnr_db=None, images=11)


def test_agreement_and_sqnr(classifier, weight, images):
    other = weight + np.random.default_rng(2).normal(size=weight.shape).astype(np.float32) * 0.5
    rows = images.reshape(len(images), -1)
    expected, got = (rows.astype(np.float64) @ matrix for matrix in (weight, other))
    result = evaluate(
        classifier(other), make_samples(images), reference=classifier(weight, name="reference.onnx"), batch=4
    )
    same = (expected.argmax(1) == got.argmax(1)).mean()
    assert 0 < same < 1
    assert result.agreement == same
    assert result.sqnr_db == pytest.approx(
        10 * math.log10((expected**2).sum() / ((expected - got) ** 2).sum()), abs=DB_TOLERANCE
    )
    assert (result.top1, result.top5) == (None, None)


def test_batch_size_changes_nothing(classifier, weight, images):
    labels = np.arange(11) % CLASSES
    path = classifier(weight)
    assert evaluate(path, make_samples(images, labels), batch=1) == evaluate(
        path, make_samples(images, labels), batch=64
    )


def test_fixed_batch_is_padded_and_the_padding_dropped(classifier, weight, images):
    labels = np.arange(11) % CLASSES
    dynamic = evaluate(classifier(weight), make_samples(images, labels))
    fixed = evaluate(classifier(weight, batch=4, name="fixed.onnx"), make_samples(images, labels))
    assert fixed == dynamic
    assert fixed.images == 11


def test_model_and_reference_may_have_other_fixed_batches(classifier, weight, images):
    reference = classifier(weight, batch=3, name="reference.onnx")
    result = evaluate(classifier(weight, batch=4), make_samples(images), reference=reference)
    assert result.agreement == 1.0


def test_padding_that_cannot_be_dropped_is_an_error(save_nodes, images):
    path = save_nodes(
        "sum.onnx",
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        [("x", [4, 3, SIDE, SIDE])],
        [("y", [])],
        {},
    )
    with pytest.raises(ModelError, match="padding cannot be dropped"):
        evaluate(path, make_samples(images))


def test_dense_output_has_sqnr_only(dense, images):
    result = evaluate(dense, make_samples(images, np.arange(11)), reference=dense)
    assert result == Evaluation(top1=None, top5=None, agreement=None, sqnr_db=MAX_SQNR_DB, images=11)


def test_fewer_than_five_classes_have_no_top5(classifier, weight, images):
    result = evaluate(classifier(weight[:, :4]), make_samples(images, np.zeros(11, np.int64)))
    assert result.top1 is not None
    assert result.top5 is None


def test_ties_rank_by_class_number(classifier, weight, images):
    flat = classifier(np.zeros_like(weight))
    assert evaluate(flat, make_samples(images, np.zeros(11, np.int64))).top1 == 1.0
    last = evaluate(flat, make_samples(images, np.full(11, CLASSES - 1)))
    assert (last.top1, last.top5) == (0.0, 0.0)


def test_label_that_is_no_class_is_an_error(classifier, weight, images):
    with pytest.raises(DataError, match="label 6 is no class of the model, which has 6"):
        evaluate(classifier(weight), make_samples(images, np.full(11, CLASSES)))


def test_named_sub_folders_that_are_not_the_classes_give_no_top1(classifier, weight, images, caplog):
    labels = np.arange(11) % 2
    with caplog.at_level(logging.WARNING):
        result = evaluate(classifier(weight), make_samples(images, labels, {0: "cat", 1: "dog"}), batch=2)
    assert (result.top1, result.top5) == (None, None)
    assert caplog.text.count("2 sub-folders and the model 6 classes") == 1


def test_numbered_sub_folders_need_not_be_complete(classifier, weight, images):
    labels = np.full(11, 3)
    assert evaluate(classifier(weight), make_samples(images, labels, {3: "3"})).top1 is not None


def test_other_output_shape_is_no_reference(classifier, weight, dense, images):
    with pytest.raises(ModelError, match="outputs have shapes"):
        evaluate(classifier(weight), make_samples(images), reference=dense)


def test_nan_output_is_an_error(classifier, weight, images):
    weight[0, 0] = np.nan
    with pytest.raises(VerifyError, match="NaN"):
        evaluate(classifier(weight), make_samples(images))


def test_two_inputs_are_refused(save_nodes, images):
    shape = ["batch", 3, SIDE, SIDE]
    path = save_nodes(
        "two.onnx", [helper.make_node("Add", ["a", "b"], ["y"])], [("a", shape), ("b", shape)], [("y", shape)], {}
    )
    with pytest.raises(ModelError, match=r"2 inputs \(a, b\)"):
        evaluate(path, make_samples(images))


def test_half_precision_input_is_refused(dense, images):
    model = onnx.load(dense)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(ModelError, match="float16"):
        evaluate(model.SerializeToString(), make_samples(images))


def test_batch_of_zero_is_refused(dense, images):
    with pytest.raises(RecipeError, match="batch is 0"):
        evaluate(dense, make_samples(images), batch=0)


def test_progress_reaches_the_end(dense, images):
    calls = []
    evaluate(dense, make_samples(images), batch=4, progress=lambda *call: calls.append(call))
    assert calls == [("evaluate", 4, 11), ("evaluate", 8, 11), ("evaluate", 11, 11)]


@pytest.mark.parametrize(
    ("signal", "noise", "expected"), [(100.0, 1.0, 20.0), (1.0, 10.0, -10.0), (1.0, 0.0, MAX_SQNR_DB), (0.0, 1.0, None)]
)
def test_sqnr_db(signal: float, noise: float, expected: float | None):
    assert sqnr_db(signal, noise) == expected


def test_noise_that_is_no_number_is_not_taken_for_none():
    found = sqnr_db(1.0, math.nan)
    assert found is not None
    assert math.isnan(found)
