"""FoldAffine: constants behind a Linear go into it; the output stays."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.edit import set_initializer
from mptqc.graph.match import find_linears
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.fold_affine import FoldAffine

EPSILON = 2.0**-24
"""Half a unit in the last place of 1 in float32."""

HEADER = "g (float[b,3,4] x) => (float[b,3,4] y)"
CONSTANTS = (
    "float[4,4] W = {1,-2,3,-4,5,-6,7,-8,9,-1,2,-3,4,-5,6,-7}, float[4] b = {0.5,1,-1,2}, "
    "float[4] c = {2,3,-5,0.25}, float half = {0.5}, float[1,1,4] row = {2,3,-5,0.25}, float[3,1] rows = {1,2,3}, "
    "float[2,1,2] heads = {2,3,-5,0.25}, float[1,2,1,1] per_head = {2,3}, float[1,1,1,1,1] deep = {2}, "
    "float[4] has_zero = {1,0,2,3}, int64[4] split_heads = {0,0,2,2}, int64 token = {0}"
)
LINEAR = "p = MatMul(x, W)\nl = Add(p, b)\n"
HEADS = LINEAR + "r = Reshape(l, split_heads)\nt = Transpose<perm=[0,2,1,3]>(r)\n"
Q_OUTPUT = "g (float[b,3,4] x) => (float[b,2,3,2] y)"


def graph(body: str, header: str = HEADER) -> str:
    return f"{header} <{CONSTANTS}> {{\n{body}\n}}"


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)}


def fold(model: ir.Model) -> int:
    return FoldAffine(concrete_shapes(model))(model).edits


def tolerance(wanted: np.ndarray) -> float:
    """W and b are rounded once more, the four products and the bias are summed in float32: ten roundings at most."""
    return 10 * EPSILON * 8 * float(np.abs(wanted).max())


FOLDED = {
    "layer_scale": (LINEAR + "y = Mul(l, c)", HEADER),
    "layer_scale_left": (LINEAR + "y = Mul(c, l)", HEADER),
    "divided": (LINEAR + "y = Div(l, c)", HEADER),
    "second_bias": (LINEAR + "y = Add(row, l)", HEADER),
    "subtracted": (LINEAR + "y = Sub(l, c)", HEADER),
    "scalar": (LINEAR + "y = Mul(l, half)", HEADER),
    "behind_the_heads": (HEADS + "y = Mul(t, half)", Q_OUTPUT),
    "a_bias_per_head_and_channel": (HEADS + "y = Add(t, heads)", Q_OUTPUT),
    "a_scale_per_head": (HEADS + "y = Mul(t, per_head)", Q_OUTPUT),
    "part_of_the_channels": (
        LINEAR + "f, s = Split<axis=2, num_outputs=2>(l)\nz = Mul(f, half)\ny = Concat<axis=2>(z, s)",
        HEADER,
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded(parse, run_model, name):
    before, model = parse(graph(*FOLDED[name])), parse(graph(*FOLDED[name]))
    assert fold(model) == 1
    assert not {"Mul", "Div", "Sub"} & {node.op_type for node in model.graph}
    assert [node.op_type for node in model.graph].count("Add") == 1
    (wanted,), (got,) = run_model(before, feeds()), run_model(model, feeds())
    assert np.abs(got - wanted).max() <= tolerance(wanted)


def test_a_chain_folds_one_by_one(parse, run_model):
    body = graph(LINEAR + "u = Mul(l, c)\nv = Sub(u, b)\ny = Div(v, half)")
    before, model = parse(body), parse(body)
    assert fold(model) == 3
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    (wanted,), (got,) = run_model(before, feeds()), run_model(model, feeds())
    assert np.abs(got - wanted).max() <= tolerance(wanted)


K = "k = Transpose<perm=[0,1,3,2]>(t2)\n"
SECOND = "p2 = MatMul(x, W)\nl2 = Add(p2, c)\nr2 = Reshape(l2, split_heads)\nt2 = Transpose<perm=[0,2,1,3]>(r2)\n" + K
SCORES = "g (float[b,3,4] x) => (float[b,2,3,3] y)"


@pytest.mark.parametrize("scale", ["Mul(s, half)", "Mul(half, s)", "Div(s, half)"])
def test_a_scale_on_the_scores_goes_to_q(parse, run_model, scale):
    body = graph(HEADS + SECOND + f"s = MatMul(t, k)\ny = {scale}", SCORES)
    before, model = parse(body), parse(body)
    assert fold(model) == 2  # to q, and into its Linear
    q, key = find_linears(model)
    np.testing.assert_array_equal(q.bias, find_linears(before)[0].bias * (2 if "Div" in scale else 0.5))
    np.testing.assert_array_equal(key.bias, find_linears(before)[1].bias)
    (wanted,), (got,) = run_model(before, feeds()), run_model(model, feeds())
    assert np.abs(got - wanted).max() <= tolerance(wanted)


@pytest.mark.parametrize(("factor", "size"), [("half", 1), ("per_head", 2)])
def test_a_scale_on_the_scores_stays_at_a_q_that_is_no_linear_s(parse, run_model, factor, size):
    body = graph(HEADS + SECOND + f"q = Relu(t)\ns = MatMul(q, k)\nm = Mul(s, {factor})\ny = Relu(m)", SCORES)
    before, model = parse(body), parse(body)
    assert fold(model) == 1
    (scaled,) = [node for node in model.graph if node.op_type == "Mul"]
    assert [node.op_type for node in scaled.outputs[0].consumers()] == ["MatMul"]
    assert scaled.inputs[1].const_value.numpy().size == size
    (wanted,), (got,) = run_model(before, feeds()), run_model(model, feeds())
    assert np.abs(got - wanted).max() <= tolerance(wanted)
    assert fold(model) == 0


NEGATIVES = {
    "another_reader": (LINEAR + "z = Mul(l, c)\ny = Add(z, l)", HEADER),
    "graph_output": (LINEAR + "y = Mul(l, c)", "g (float[b,3,4] x) => (float[b,3,4] y, float[b,3,4] l)"),
    "a_constant_per_token": (LINEAR + "y = Mul(l, rows)", HEADER),
    "subtracted_from": (LINEAR + "y = Sub(c, l)", HEADER),
    "divided_by": (LINEAR + "y = Div(c, l)", HEADER),
    "divided_by_zero": (LINEAR + "y = Div(l, has_zero)", HEADER),
    "computed_factor": (LINEAR + "y = Mul(l, x)", HEADER),
    "no_linear": ("r = Relu(x)\ny = Mul(r, c)", HEADER),
    "no_bias": ("p = MatMul(x, W)\ny = Mul(p, c)", HEADER),
    "a_constant_that_widens": (
        LINEAR + "f = Gather<axis=1>(l, token)\ny = Mul(f, rows)",
        "g (float[1,3,4] x) => (float[3,4] y)",
    ),
    "channels_read_elsewhere": (
        LINEAR + "f = Gather<axis=1>(l, token)\nz = Mul(f, c)\ny = Add(l, z)",
        "g (float[1,3,4] x) => (float[1,3,4] y)",
    ),
    "scores_read_twice": (HEADS + SECOND + "s = MatMul(t, k)\nz = Mul(s, half)\ny = Add(z, s)", SCORES),
    "a_scale_that_adds_an_axis": (
        HEADS + SECOND + "s = MatMul(t, k)\ny = Mul(s, deep)",
        "g (float[b,3,4] x) => (float[1,b,2,3,3] y)",
    ),
    "a_context": (
        HEADS + SECOND + "s = MatMul(t, k)\nw = Softmax<axis=-1>(s)\nz = MatMul(w, t)\ny = Mul(z, half)",
        "g (float[b,3,4] x) => (float[b,2,3,2] y)",
    ),
    "q_times_itself": (
        LINEAR + "r = Reshape(l, square)\ns = MatMul(r, r)\ny = Mul(s, half)",
        "g (float[b,2,2,4] x) => (float[b,2,4,4] y)",
    ),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_left_alone(parse, name):
    text = graph(*NEGATIVES[name]).replace("int64 token", "int64[4] square = {0,0,4,-1}, int64 token")
    if name == "q_times_itself":
        text = text.replace("float[4,4] W", "float[4,8] W").replace(
            "{1,-2,3", "{1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8,1,-2,3"
        )
        text = text.replace("float[4] b = {0.5,1,-1,2}", "float[8] b = {1,2,3,4,5,6,7,8}")
    model = parse(text)
    before = ir.to_onnx_text(model)
    assert fold(model) == 0
    assert ir.to_onnx_text(model) == before


def test_a_shared_weight_is_copied(parse):
    body = LINEAR + "u = Mul(l, c)\np2 = MatMul(u, W)\ny = Add(p2, b)"
    model = parse(graph(body))
    assert fold(model) == 1
    first, second = find_linears(model)
    np.testing.assert_array_equal(first.weight, second.weight * np.array([2, 3, -5, 0.25], np.float32))
    np.testing.assert_array_equal(second.bias, [0.5, 1, -1, 2])


def test_second_run_changes_nothing(parse):
    model = parse(graph(*FOLDED["behind_the_heads"]))
    fold(model)
    text = ir.to_onnx_text(model)
    assert fold(model) == 0
    assert ir.to_onnx_text(model) == text


def test_the_scale_of_a_whole_vit_goes_and_its_output_stays(tiny_vit, run_model):
    before, model = tiny_vit(layer_scale=True), tiny_vit(layer_scale=True)
    assert fold(model) == 4
    assert "Mul" not in {node.op_type for node in model.graph}
    images = {"images": np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)}
    (wanted,), (got,) = run_model(before, images), run_model(model, images)
    # A few hundred roundings on the way through two blocks, none amplified more than tenfold.
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.sampled_from(["Mul", "Div", "Add", "Sub"]), st.integers(-3, 3))
def test_any_weights_and_constants(parse, run_model, seed, op, magnitude):
    random = np.random.default_rng(seed)
    models = []
    arrays = [
        random.normal(size=(4, 4)).astype(np.float32),
        random.normal(size=4).astype(np.float32),
        (random.uniform(0.5, 1, 4) * random.choice([-1, 1], 4) * 10.0**magnitude).astype(np.float32),
    ]
    for _ in range(2):
        model = parse(graph(LINEAR + f"y = {op}(l, c)"))
        product, add, affine = model.graph
        for node, array in zip((product, add, affine), arrays, strict=True):
            set_initializer(node, 1, array)
        models.append(model)
    assert fold(models[1]) == 1
    (wanted,), (got,) = (run_model(model, feeds()) for model in models)
    # Each of four products, their sum, the bias and the constant is rounded once, relative to the largest of the terms.
    weight, bias, constant = (array.astype(np.float64) for array in arrays)
    scale = {"Mul": np.abs(constant), "Div": 1 / np.abs(constant)}.get(op, np.ones(4))
    terms = (np.abs(feeds()["x"]) @ np.abs(weight) + np.abs(bias)) * scale + (np.abs(constant) if op in "AddSub" else 0)
    assert (np.abs(got - wanted) <= 12 * EPSILON * terms).all()


def test_golden(parse, as_text):
    model = parse(graph(HEADS + "y = Mul(t, half)", Q_OUTPUT))
    fold(model)
    assert as_text(model) == GOLDEN


def test_wrong_stage_raises(parse):
    model = parse(graph(LINEAR + "y = Mul(l, c)"))
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="fold-affine"):
        FoldAffine({})(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[b,3,4] x) => (float[b,2,3,2] y)
   <int64[4] split_heads =  {0,0,2,2}, float[4,4] W_1 =  {0.5,-1,1.5,-2,2.5,-3,3.5,-4,4.5,-0.5,1,-1.5,2,-2.5,3,-3.5}, \
float[4] b_1 =  {0.25,0.5,-0.5,1}, int64[4] split_heads, float[4,4] W_1, float[4] b_1, float[b,3,4] p, \
float[b,3,4] l, float[b,3,2,2] r>
{
   p = MatMul (x, W_1)
   l = Add (p, b_1)
   r = Reshape (l, split_heads)
   y = Transpose <perm: ints = [0, 2, 1, 3]> (r)
}
"""
