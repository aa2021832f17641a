"""Rotating heads changes no output, spreads an outlier channel, and leaves alone what it cannot compensate."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from rotary_blocks import rotated

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.blocks import attention_projections
from mptqc.graph.edit import set_initializer
from mptqc.graph.match import find_attentions, find_linears
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.rotate_heads import RotateHeads, random_rotations
from mptqc.runtime.session import create_session, run_arrays

FLOAT32_CHAIN = 1e-5
"""Relative to the largest output: a dozen float32 sums of some twenty terms, 6e-8 each, and their growth."""
HEADS, HEAD_SIZE = 2, 6


@pytest.fixture
def canonical(block: Callable[[], ir.Model]) -> ir.Model:
    model = block()
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    return model


def rotate(model: ir.Model) -> int:
    return int(RotateHeads(3, concrete_shapes(model))(model).edits)


def run(model: ir.Model) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((2, 7, 12)).astype(np.float32)
    return run_arrays(create_session(ir.to_proto(model).SerializeToString()), ["y"], {"x": x})[0]


def test_the_output_stays_and_every_weight_around_turns(canonical: ir.Model) -> None:
    before = run(canonical)
    (attention,) = find_attentions(canonical)
    around = attention_projections(attention, canonical, concrete_shapes(canonical))
    old = [linear.weight.copy() for linear in (*around.scores, around.v, around.proj)]
    assert rotate(canonical) == 1
    for linear, weight in zip((*around.scores, around.v, around.proj), old, strict=True):
        assert np.abs(linear.weight - weight).max() > 0.1
    np.testing.assert_allclose(run(canonical), before, atol=FLOAT32_CHAIN * np.abs(before).max())


def test_an_outlier_channel_is_spread_over_its_head_alone(canonical: ir.Model) -> None:
    (attention,) = find_attentions(canonical)
    k = attention_projections(attention, canonical, concrete_shapes(canonical)).scores[1]
    bias = np.zeros(HEADS * HEAD_SIZE, np.float32)
    bias[1] = 60.0
    set_initializer(k.add, k.bias_index, bias)
    rotate(canonical)
    assert np.abs(k.bias[:HEAD_SIZE]).max() < 0.95 * 60.0
    assert np.linalg.norm(k.bias[:HEAD_SIZE]) == pytest.approx(60.0, rel=1e-6)
    assert not k.bias[HEAD_SIZE:].any()


def test_an_attention_whose_k_has_another_reader_is_left_alone(canonical: ir.Model) -> None:
    k = next(node for node in canonical.graph if node.outputs[0].name == "kl")
    canonical.graph.outputs.append(k.outputs[0])
    text = ir.to_proto(canonical).SerializeToString()
    assert rotate(canonical) == 0
    assert ir.to_proto(canonical).SerializeToString() == text


def test_of_rotary_heads_v_and_the_context_turn_alone(canonical: ir.Model) -> None:
    rotated(canonical, 2)
    before = run(canonical)
    around = attention_projections(find_attentions(canonical)[0], canonical, concrete_shapes(canonical))
    assert around.scores is None
    old = {linear.site: linear.weight.copy() for linear in find_linears(canonical)}
    assert rotate(canonical) == 1
    now = {linear.site: linear.weight for linear in find_linears(canonical)}
    assert [site for site in old if not np.array_equal(old[site], now[site])] == ["block00.v", "block00.proj"]
    np.testing.assert_allclose(run(canonical), before, atol=FLOAT32_CHAIN * np.abs(before).max())


def test_only_a_canonical_model_is_rotated(block: Callable[[], ir.Model]) -> None:
    with pytest.raises(StageError, match="rotate-heads"):
        rotate(block())


def test_rotations_are_orthogonal_and_seeded() -> None:
    matrices = random_rotations(3, 5, np.random.default_rng(0))
    np.testing.assert_allclose(
        matrices @ matrices.transpose(0, 2, 1), np.broadcast_to(np.eye(5), (3, 5, 5)), atol=1e-12
    )
    np.testing.assert_array_equal(matrices, random_rotations(3, 5, np.random.default_rng(0)))
    assert np.abs(matrices - random_rotations(3, 5, np.random.default_rng(1))).max() > 0.1
