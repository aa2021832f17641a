"""PartHeads and JoinHeads: batch and heads get an axis each; heads come together in one way."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.match import find_attentions, find_linears
from mptqc.passes.base import STAGE_KEY, Stage
from mptqc.passes.join_heads import JoinHeads
from mptqc.passes.part_heads import PartHeads
from mptqc.passes.separate_projections import SeparateProjections, find_projections

T, C, H = 5, 6, 2
D = C // H
RANDOM = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray] = {
    "W": RANDOM.normal(size=(C, 3 * C)).astype(np.float32),
    "b": RANDOM.normal(size=3 * C).astype(np.float32),
    "V": RANDOM.normal(size=(C, C)).astype(np.float32),
    "c": RANDOM.normal(size=C).astype(np.float32),
    "mask": RANDOM.normal(size=(1, T, T)).astype(np.float32),
    "half": np.array(0.5, np.float32),
    "parts": np.array([0, 0, 3, H, D], np.int64),
    "rows": np.array([-1, T, D], np.int64),
    "heads": np.array([-1, H, T, D], np.int64),
    "joined": np.array([-1, T, C], np.int64),
    "sequence": np.array([T, -1, C], np.int64),
    **{f"i{i}": np.array(i, np.int64) for i in range(3)},
}
OPERANDS = (
    "m = MatMul(x, W)\nl = Add(m, b)\nr = Reshape(l, parts)\nt = Transpose<perm=[2,0,3,1,4]>(r)\n"
    "q4 = Gather<axis=0>(t, i0)\nk4 = Gather<axis=0>(t, i1)\nv4 = Gather<axis=0>(t, i2)\n"
    "q = Reshape(q4, rows)\nk3 = Reshape(k4, rows)\nv = Reshape(v4, rows)\nk = Transpose<perm=[0,2,1]>(k3)\n"
)
ATTEND = "s0 = MatMul(q, k)\ns1 = Mul(s0, half)\ns = Add(s1, mask)\np = Softmax(s)\nc0 = MatMul(p, v)\n"
JOIN = "c4 = Reshape(c0, heads)\nct = Transpose<perm=[0,2,1,3]>(c4)\ncr = Reshape(ct, joined)\n"
LONG_JOIN = (
    "c4 = Reshape(c0, heads)\nct = Transpose<perm=[2,0,1,3]>(c4)\ncs = Reshape(ct, sequence)\n"
    "cr = Transpose<perm=[1,0,2]>(cs)\n"
)
LINEAR = "p2 = MatMul(cr, V)\ny = Add(p2, c)"


@pytest.fixture
def make(smoothed) -> Callable[..., ir.Model]:
    def from_body(body: str, batch: str = "n", output: str = "", **more: np.ndarray) -> ir.Model:
        used = {name: a for name, a in (ARRAYS | more).items() if f" {name})" in body or f"({name}," in body}
        model: ir.Model = smoothed(f"float[{batch},{T},{C}] x", output or f"float[{batch},{T},{C}] y", body, {}, used)
        model.metadata_props[STAGE_KEY] = Stage.RAW
        return model

    return from_body


def part(model: ir.Model) -> int:
    return PartHeads(concrete_shapes(model), concrete_shapes(model, batch=2))(model).edits


@pytest.mark.parametrize("join", [JOIN, LONG_JOIN])
def test_attentions_of_three_axes_get_four(make, run_batch, join: str) -> None:
    model = make(OPERANDS + ATTEND + join + LINEAR)
    expected = [run_batch(model, batch) for batch in (1, 3)]
    assert part(model) == 1
    assert len(find_projections(model, concrete_shapes(model))) == 3
    SeparateProjections(concrete_shapes(model))(model)
    JoinHeads(concrete_shapes(model, batch=2))(model)
    for batch, wanted in zip((1, 3), expected, strict=True):
        np.testing.assert_allclose(run_batch(model, batch), wanted, rtol=0, atol=2**-18)
    (attention,) = find_attentions(model)
    shapes = concrete_shapes(model, batch=2)
    assert shapes[str(attention.scores.outputs[0].name)] == (2, H, T, T)
    linear = find_linears(model)[-1]
    reshape = linear.input.producer()
    assert reshape is not None and reshape.inputs[0] is not None
    transpose = reshape.inputs[0].producer()
    assert transpose is not None and transpose.inputs[0] is attention.context.outputs[0]
    assert part(model) == 0
    assert JoinHeads(concrete_shapes(model, batch=2))(model).edits == 0


def test_a_fixed_batch_tells_the_heads_too(make, run_batch) -> None:
    model = make(OPERANDS + ATTEND + JOIN + LINEAR, "2")
    expected = run_batch(model, 2)
    shapes = concrete_shapes(model)
    assert PartHeads(shapes, shapes)(model).edits == 1
    np.testing.assert_allclose(run_batch(model, 2), expected, rtol=0, atol=2**-18)
    assert concrete_shapes(model)[str(find_attentions(model)[0].q.name)] == (2, H, T, D)


def test_scores_that_are_multiplied_by_what_is_computed_are_left(make) -> None:
    model = make(OPERANDS + ATTEND.replace("Mul(s0, half)", "Mul(s0, s0)") + JOIN + LINEAR)
    assert part(model) == 0


def test_what_differs_from_head_to_head_is_left(make) -> None:
    by_head = RANDOM.normal(size=(H, T, T)).astype(np.float32)
    model = make(OPERANDS + ATTEND.replace("mask)", "by_head)") + JOIN + LINEAR, "1", by_head=by_head)
    shapes = concrete_shapes(model)
    assert PartHeads(shapes, shapes)(model).edits == 0


def test_a_context_that_is_the_output_keeps_its_name_and_shape(make, run_batch) -> None:
    model = make(OPERANDS + ATTEND.replace("c0 = ", "y = "), output=f"float[m,{T},{D}] y")
    expected = run_batch(model, 3)
    assert part(model) == 1
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(run_batch(model, 3), expected, rtol=0, atol=2**-18)


def test_images_that_are_mixed_are_not_joined_straight(make) -> None:
    mixed = (
        "c4 = Reshape(c0, heads)\nct = Transpose<perm=[0,2,1,3]>(c4)\ncs = Reshape(ct, joined)\n"
        "cm = Transpose<perm=[1,0,2]>(cs)\ncr = Reshape(cm, joined)\n"
    )
    model = make(OPERANDS + ATTEND + mixed + LINEAR)
    part(model)
    assert JoinHeads(concrete_shapes(model, batch=2))(model).edits == 0
