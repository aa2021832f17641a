"""FoldMasks: what is added alike for every image is a constant, whatever the exporter computed it from."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Stage
from mptqc.passes.fold_masks import FoldMasks
from mptqc.passes.freeze_shapes import FreezeShapes
from mptqc.passes.infer_shapes import InferShapes

H, T, W = 2, 5, 3
RANDOM = np.random.default_rng(0)
MASK = np.where(RANDOM.random((W, 1, T, T)) < 0.3, -100, 0).astype(np.float32)
ARRAYS: dict[str, np.ndarray] = {
    "yes": np.ones((1, 1, T, 1), bool),
    "nought": np.array(0, np.float32),
    "lowest": np.array(-np.inf, np.float32),
    "bias": RANDOM.normal(size=(H, T, T)).astype(np.float32),
    "mask": MASK,
    "columns": np.where(np.arange(T) < 3, 0, -np.inf).astype(np.float32)[None, None, None],
    "zeros": np.zeros((1, 1, T, T), np.float32),
    "rest": np.array([1, T, T], np.int64),
    "ones": np.array([1, 1, 1], np.int64),
    "first": np.array([0], np.int64),
    "i0": np.array(0, np.int64),
}
BATCH = "n = Shape<start=0, end=1>(x)\n"
EXPANDED = BATCH + "shape = Concat<axis=0>(n, rest)\nall = Expand(yes, shape)\nm = Where(all, nought, lowest)\n"
TILED = BATCH + "times = Concat<axis=0>(n, ones)\nm = Tile(mask, times)\n"
WINDOWS = (
    BATCH + "three = Mul(n, count)\nshape = Concat<axis=0>(three, heads)\ns = Reshape(x, shape)\n" + TILED[len(BATCH) :]
)
PER_IMAGE = BATCH + "end = Squeeze(n)\ni = Range(i0, end, one)\nf = Cast<to=1>(i)\nm = Unsqueeze(f, axes)\n"


@pytest.fixture
def make(smoothed) -> Callable[..., ir.Model]:
    def from_body(body: str, batch: str = "b", **more: np.ndarray) -> ir.Model:
        arrays = {name: array for name, array in (ARRAYS | more).items() if f"{name})" in body or f"{name}," in body}
        x = f"float[{batch},{H if 'count' not in body else W * H},{T},{T}] x"
        model: ir.Model = smoothed(x, f"float[y0,{H},{T},{T}] y", body, {}, arrays)
        model.metadata_props[STAGE_KEY] = Stage.RAW
        return model

    return from_body


def fold(model: ir.Model) -> tuple[ir.Model, int]:
    FreezeShapes()(model)
    InferShapes()(model)  # where the batch is fixed the exporter says the shapes
    edits = FoldMasks()(model).edits
    return model, edits


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (EXPANDED + "a = Add(x, m)\ny = Softmax(a)", ["Softmax"]),
        (EXPANDED + "a = Add(m, x)\ny = Softmax(a)", ["Softmax"]),
        (EXPANDED.replace("yes", "columns_kept") + "a = Add(x, m)\ny = Softmax(a)", ["Add", "Softmax"]),
        (EXPANDED + "c = Add(bias1, m)\na = Add(x, c)\ny = Softmax(a)", ["Add", "Softmax"]),
        (EXPANDED + "a0 = Add(x, m)\na = Add(m, a0)\ny = Softmax(a)", ["Softmax"]),
        ("a = Add(x, zeros)\ny = Softmax(a)", ["Softmax"]),
        ("a = Add(x, bias)\ny = Softmax(a)", ["Add", "Softmax"]),
    ],
)
def test_what_every_image_gets_is_added_once(make, run_batch, body: str, left: list[str]) -> None:
    kept = (np.arange(T) < 3)[None, None, None]
    model = make(body, columns_kept=kept, bias1=ARRAYS["bias"][None])
    expected = [run_batch(model, batch) for batch in (1, 4)]
    model, _ = fold(model)
    assert ops(model) == left
    for batch, wanted in zip((1, 4), expected, strict=True):
        assert np.array_equal(run_batch(model, batch), wanted)
    assert FoldMasks()(model).edits == 0


def test_a_mask_of_windows_is_added_to_each_image_s(make, run_batch) -> None:
    heads = np.array([H, T, T], np.int64)
    model = make(WINDOWS + "a = Add(s, m)\ny = Softmax(a)", count=np.array([W], np.int64), heads=heads)
    expected = [run_batch(model, batch) for batch in (1, 2)]
    model, edits = fold(model)
    assert edits == 1
    assert [op for op in ops(model) if op != "Reshape"] == ["Add", "Softmax"]
    assert any(np.array_equal(value.const_value.numpy(), MASK[None]) for value in model.graph.initializers.values())
    for batch, wanted in zip((1, 2), expected, strict=True):
        assert np.array_equal(run_batch(model, batch), wanted)


def test_a_fixed_batch_needs_no_other(make, run_batch) -> None:
    model = make(EXPANDED + "a = Add(x, m)\ny = Softmax(a)", batch="4")
    expected = run_batch(model, 4)
    model, _ = fold(model)
    assert ops(model) == ["Softmax"]
    assert np.array_equal(run_batch(model, 4), expected)


def test_what_differs_from_image_to_image_stays(make, run_batch) -> None:
    axes, one = np.array([1, 2, 3], np.int64), np.array(1, np.int64)
    model = make(PER_IMAGE + "a = Add(x, m)\ny = Softmax(a)", axes=axes, one=one)
    expected = run_batch(model, 3)
    model, edits = fold(model)
    assert edits == 0
    assert np.array_equal(run_batch(model, 3), expected)
