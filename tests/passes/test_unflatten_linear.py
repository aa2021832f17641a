import numpy as np
import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.unflatten_linear import UnflattenLinear

CONSTANTS = (
    "float[3,2] W = {1,-2,3,4.5,-5,6}, float[2,3] V = {1,3,-5,-2,4.5,6}, float[2] b = {0.5,-1}, float[3] c = {1,2,3}, "
    "float s = {0.5}, int64[2] flat = {-1,3}, int64[3] parted = {-1,4,2}, int64[3] wide = {-1,4,3}, "
    "int64[3] windows = {-1,2,2}, int64[3] copied = {0,4,2}"
)
CUBE = "g (float[n,4,3] x) => (float[n,4,2] y)"
LINEAR = "r = Reshape(x, flat) p = MatMul(r, W) q = Add(p, b) "
# A Linear and a GELU each, rounded the same way whatever the rows are called.
EXACT = 0.0


def graph(header: str, body: str) -> str:
    return f"{header} <{CONSTANTS}> {{ {body} }}"


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def check_same(before: ir.Model, model: ir.Model, run_model, batch: int = 2) -> None:
    shape = [dim if isinstance(dim, int) else batch for dim in model.graph.inputs[0].shape]
    feeds = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    for wanted, got in zip(run_model(before, feeds), run_model(model, feeds), strict=True):
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= EXACT


FORMS = {
    "linear": (CUBE, LINEAR + "y = Reshape(q, parted)", ["MatMul", "Add"]),
    "bias_first": (CUBE, LINEAR.replace("Add(p, b)", "Add(b, p)") + "y = Reshape(q, parted)", ["MatMul", "Add"]),
    "scaled": (CUBE, LINEAR + "t = Mul(s, q) y = Reshape(t, parted)", ["MatMul", "Add", "Mul"]),
    "mlp": (
        "g (float[n,4,3] x) => (float[n,4,3] y)",
        LINEAR + "h = Gelu(q) u = MatMul(h, V) w = Add(u, c) y = Reshape(w, wide)",
        ["MatMul", "Add", "Gelu", "MatMul", "Add"],
    ),
    "norm_inside": (
        CUBE,
        LINEAR + "t = LayerNormalization<axis=1>(q, b, b) y = Reshape(t, parted)".replace("axis=1", "axis=-1"),
        ["MatMul", "Add", "LayerNormalization"],
    ),
    "two_unknown_axes_by_name": (
        "g (float[n,t,3] x, int64[3] shape) => (float[n,t,2] y)",
        LINEAR + "y = Reshape(q, shape)",
        ["MatMul", "Add"],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_no_reshape_is_left(parse, name):
    header, body, expected = FORMS[name]
    model = parse(graph(header, body))
    assert UnflattenLinear()(model).edits == 1
    assert ops(model) == expected
    assert model.graph[0].inputs[0] is model.graph.inputs[0]


@pytest.mark.parametrize("name", [name for name in FORMS if "unknown" not in name])
def test_same_numbers_after(parse, run_model, name):
    header, body, _ = FORMS[name]
    before, model = parse(graph(header, body)), parse(graph(header, body))
    UnflattenLinear()(model)
    check_same(before, model, run_model)


def test_golden(parse, as_text):
    model = parse(graph(*FORMS["mlp"][:2]))
    UnflattenLinear()(model)
    assert as_text(model) == GOLDEN


def test_other_rows_take_one_reshape(parse, run_model):
    header, body = "g (float[n,4,3] x) => (float[m,2,2] y)", LINEAR + "y = Reshape(q, windows)"
    before, model = parse(graph(header, body)), parse(graph(header, body))
    assert UnflattenLinear()(model).edits == 1
    assert ops(model) == ["Reshape", "MatMul", "Add"]
    assert model.graph[1].outputs[0].shape[1:] == (2, 2)
    check_same(before, model, run_model)


def test_split_channels_are_joined_first(parse, run_model):
    header = "g (float[n,4,3,1] x) => (float[n,4,2] y)"
    before, model = (parse(graph(header, LINEAR + "y = Reshape(q, parted)")) for _ in range(2))
    assert UnflattenLinear()(model).edits == 1
    assert ops(model) == ["Reshape", "MatMul", "Add"]
    check_same(before, model, run_model)


def test_flat_input_read_by_two_linears(parse, run_model):
    header = "g (float[n,4,3] x) => (float[n,4,2] y, float[n,4,2] z)"
    body = LINEAR + "y = Reshape(q, parted) o = MatMul(r, W) a = Add(o, b) z = Reshape(a, parted)"
    before, model = parse(graph(header, body)), parse(graph(header, body))
    assert UnflattenLinear()(model).edits == 2
    assert ops(model) == ["MatMul", "Add", "MatMul", "Add"]
    check_same(before, model, run_model)


def test_second_run_changes_nothing(parse):
    model = parse(graph("g (float[n,4,3] x) => (float[m,2,2] y)", LINEAR + "y = Reshape(q, windows)"))
    UnflattenLinear()(model)
    text = ir.to_onnx_text(model)
    assert UnflattenLinear()(model).edits == 0
    assert ir.to_onnx_text(model) == text


LEFT = {
    "no_linear": ("g (float[n,4,3] x) => (float[n,4,3] y)", "r = Reshape(x, flat) q = Gelu(r) y = Reshape(q, wide)"),
    "read_in_between": ("g (float[n,4,3] x) => (float[n,4,2] y, float[m,2] q)", LINEAR + "y = Reshape(q, parted)"),
    "rows_mixed": (CUBE, LINEAR + "t = Softmax<axis=0>(q) y = Reshape(t, parted)"),
    "last_axis_changes": ("g (float[n,4,3] x) => (float[m,4] y)", LINEAR + "y = Reshape(q, quads)"),
    "unproved": ("g (float[n,t,3] x, int64[3] shape) => (float[u,v,2] y)", LINEAR + "y = Reshape(q, shape)"),
    "other_rows_copied": ("g (float[n,8,3] x) => (float[m,4,2] y)", LINEAR + "y = Reshape(q, shape)"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(parse, name):
    header, body = LEFT[name]
    text = graph(header, body).replace("float s =", "int64[2] quads = {-1,4}, float s =")
    if "shape" in body and "shape" not in header:
        text = text.replace("[n,8,3] x", "[n,8,3] x, int64[3] shape")
    model = parse(text)
    before = ir.to_onnx_text(model)
    assert UnflattenLinear()(model).edits == 0
    assert ir.to_onnx_text(model) == before


def test_wrong_stage_raises(parse):
    model = parse(graph(*FORMS["linear"][:2]))
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="unflatten-linear"):
        UnflattenLinear()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[n,4,3] x) => (float[n,4,3] y)
   <float[3,2] W =  {1,-2,3,4.5,-5,6}, float[2,3] V =  {1,3,-5,-2,4.5,6}, float[2] b =  {0.5,-1}, float[3] c =  {1,2,3}, float[3,2] W, float[2,3] V, float[2] b, float[3] c, float[n,4,2] p, float[n,4,2] q, float[n,4,2] h, float[n,4,3] u>
{
   p = MatMul (x, W)
   q = Add (p, b)
   h = Gelu (q)
   u = MatMul (h, V)
   y = Add (u, c)
}
"""  # noqa: E501 - a line of the printer
