"""What the searches see of the data: bounded, weighted, the largest rows kept, the same for the same seed."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.observe import (
    EXTREME_ROWS,
    MOST_SLICES,
    RANDOM_ROWS,
    Observations,
    observe,
    origin,
    run_batches,
    with_outputs,
)
from mptqc.analysis.shapes import concrete_shapes
from mptqc.data.samples import Samples
from mptqc.graph.match import SITE_KEY, find_attentions, find_linears, find_norms
from mptqc.passes.fold_affine import FoldAffine
from mptqc.passes.separate_projections import SeparateProjections
from mptqc.runtime.session import create_session

Array = np.ndarray
TOKENS = 5


class Arrays:
    """Samples from an array in memory."""

    def __init__(self, images: Array) -> None:
        self.images = images

    def read(self, indices: Sequence[int]) -> Array:
        return self.images[list(indices)]

    def check(self, indices: Sequence[int]) -> None:
        """All is in memory."""

    def name(self, index: int) -> str:
        return f"image {index}"

    def hash_into(self, digest: object, indices: Sequence[int]) -> None:
        raise AssertionError("observing takes no digest")


def images(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)


def samples(array: Array) -> Samples:
    return Samples(Arrays(array), range(len(array)), None)


def silent(step: str, done: int, total: int) -> None:
    """No report."""


@pytest.fixture(scope="module")
def model(tiny_vit) -> ir.Model:
    model = tiny_vit()
    for make in (FoldAffine, SeparateProjections):
        make(concrete_shapes(model))(model)
    for number, attention in enumerate(find_attentions(model)):
        attention.softmax.metadata_props[SITE_KEY] = f"a{number}"
    return model


def look(model: ir.Model, array: Array, seed: int = 0, report=silent) -> Observations:
    values = [norm.output for norm in find_norms(model)] + [linear.input for linear in find_linears(model)]
    return observe(model, samples(array), values, find_attentions(model), concrete_shapes(model), seed, report)


def values_of(model: ir.Model, names: list[str], array: Array) -> dict[str, Array]:
    session = create_session(with_outputs(model, names))
    return dict(zip(names, session.run(names, {"images": array}), strict=True))


def test_ranges_cover_all_rows_of_all_images(model):
    array = images(300)
    rows = look(model, array).rows["norm_b1"]
    everything = values_of(model, ["norm_b1"], array)["norm_b1"].reshape(-1, 8)
    np.testing.assert_allclose(rows.low, everything.min(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows.high, everything.max(axis=0), rtol=1e-5, atol=1e-6)


def test_random_rows_stand_for_all_and_extremes_for_themselves(model):
    rows = look(model, images(300)).rows["norm_b1"]
    assert rows.rows.shape == (len(rows.weights), 8)
    assert rows.weights[-EXTREME_ROWS:].tolist() == [1] * EXTREME_ROWS
    assert rows.weights[:-EXTREME_ROWS].sum() == pytest.approx(300 * TOKENS)


def test_the_rows_with_the_largest_values_are_kept(model):
    array = images(300)
    rows = look(model, array).rows["norm_b1"]
    everything = values_of(model, ["norm_b1"], array)["norm_b1"].reshape(-1, 8)
    largest = np.sort(np.abs(everything).max(axis=1))[::-1][:EXTREME_ROWS]
    kept = np.sort(np.abs(rows.rows[-EXTREME_ROWS:]).max(axis=1))[::-1]
    np.testing.assert_allclose(kept, largest, rtol=1e-5)


def test_the_sample_does_not_grow_with_the_images(model):
    for count in (40, 300, 900):
        rows = look(model, images(count)).rows["norm_b1"]
        assert len(rows.rows) <= RANDOM_ROWS + count + EXTREME_ROWS
        assert len(rows.rows) <= count * TOKENS + EXTREME_ROWS


def test_few_images_give_all_their_rows(model):
    array = images(2)
    rows = look(model, array).rows["norm_b1"]
    everything = values_of(model, ["norm_b1"], array)["norm_b1"].reshape(-1, 8)
    assert len(rows.rows) == 2 * len(everything)
    np.testing.assert_allclose(np.sort(rows.rows[:10], axis=0), np.sort(everything, axis=0), rtol=1e-5, atol=1e-6)
    assert (rows.weights == 1).all()


def test_slices_are_the_operands_of_one_head_each(model):
    found = look(model, images(20)).slices["a1"]
    scores = found.q @ found.k.transpose(0, 2, 1)
    softmax = np.exp(scores - scores.max(axis=-1, keepdims=True))
    softmax /= softmax.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found.p, softmax, rtol=1e-4, atol=1e-6)
    assert found.v.shape == found.q.shape == (len(found.heads), TOKENS, 4)


def test_slices_know_their_head(model):
    array = images(3)
    found = look(model, array).slices["a0"]
    attention = find_attentions(model)[0]
    q = values_of(model, [str(attention.q.name)], array)[str(attention.q.name)]
    for piece, head in zip(found.q, found.heads, strict=True):
        assert min(np.abs(q[image, head] - piece).max() for image in range(3)) < 1e-5
    assert set(found.heads.tolist()) == {0, 1}


def test_slices_are_spread_and_bounded(model):
    assert len(look(model, images(3)).slices["a0"].heads) == 6
    assert len(look(model, images(400)).slices["a0"].heads) == MOST_SLICES


def test_a_seed_gives_the_same_sample(model):
    array = images(300)
    one, two, other = look(model, array, 1), look(model, array, 1), look(model, array, 2)
    np.testing.assert_array_equal(one.rows["norm_b1"].rows, two.rows["norm_b1"].rows)
    np.testing.assert_array_equal(one.slices["a0"].heads, two.slices["a0"].heads)
    assert not np.array_equal(one.rows["norm_b1"].rows, other.rows["norm_b1"].rows)


def test_progress_ends_at_the_number_of_images(model):
    steps = []
    look(model, images(40), report=lambda *step: steps.append(step))
    assert {step for step, _, _ in steps} == {"observe"}
    assert steps[-1][1:] == (40, 40)
    assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})


def test_every_value_asked_for_is_observed_once(model):
    found = look(model, images(2))
    wanted = {norm.output.name for norm in find_norms(model)} | {linear.input.name for linear in find_linears(model)}
    assert set(found.rows) == wanted
    assert set(found.slices) == {"a0", "a1"}


def test_a_fixed_batch_is_filled_up(tiny_vit):
    fixed = tiny_vit(batch="4")
    array = images(6)
    batches = list(run_batches(fixed, samples(array), ["logits"], 16))
    assert [count for _, count in batches] == [4, 4]
    expected = values_of(tiny_vit(), ["logits"], array)["logits"]
    np.testing.assert_allclose(batches[1][0]["logits"][:2], expected[4:], rtol=1e-4, atol=1e-5)


def test_an_open_batch_takes_the_size_asked_for(model):
    batches = list(run_batches(model, samples(images(10)), ["logits"], 4))
    assert [count for _, count in batches] == [4, 4, 2]


def test_with_outputs_leaves_the_model_alone(model):
    text = ir.to_onnx_text(model)
    session = create_session(with_outputs(model, ["norm_b0", "scores1"]))
    assert [output.name for output in session.get_outputs()] == ["norm_b0", "scores1"]
    assert ir.to_onnx_text(model) == text


def test_origin_is_above_the_movement(model):
    attention = find_attentions(model)[0]
    shapes = concrete_shapes(model)
    assert origin(attention.q, shapes).producer().op_type == "Add"
    assert origin(attention.p, shapes) is attention.p
