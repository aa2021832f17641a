import numpy as np
import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.eliminate_identity import EliminateIdentity

HEADER = "g (float[n,4,2] x) => (float[n,4,2] y)"
TARGETS = "int64[2] rows = {-1,2}, int64[3] cube = {-1,4,2}, int64[3] other = {-1,2,4}, int64[3] copy = {0,4,2}"


def graph(body: str, header: str = HEADER) -> str:
    return f"{header} <{TARGETS}> {{ {body} }}"


REMOVED = {
    "identity_chain": "a = Identity(x) c = Identity(a) y = Relu(c)",
    "dropout": "a = Dropout(x) y = Relu(a)",
    "cast": "a = Cast<to=1>(x) y = Relu(a)",
    "transpose": "a = Transpose<perm=[0,1,2]>(x) y = Relu(a)",
    "reshape": "a = Reshape(x, cube) y = Relu(a)",
    "copying_reshape": "a = Reshape(x, copy) y = Relu(a)",
    "reshape_there_and_back": "a = Reshape(x, rows) c = Reshape(a, cube) y = Relu(c)",
    "at_the_output": "a = Relu(x) y = Identity(a)",
}


@pytest.mark.parametrize("name", REMOVED)
def test_what_does_nothing_is_removed(parse, name):
    model = parse(graph(REMOVED[name]))
    assert EliminateIdentity()(model).edits > 0
    assert [node.op_type for node in model.graph] == ["Relu"]
    assert [output.name for output in model.graph.outputs] == ["y"]


NORM = "one = Shape(x) norm = ReduceL2<keepdims=1>(x, last) "


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("e = Expand(norm, one) y = Div(x, e)", False),
        ("e = Expand(norm, one) a = Add(e, x) y = Mul(a, e)", False),
        ("e = Expand(norm, one) a = Relu(e) y = Div(x, a)", True),  # what reads it does not expand
        ("e = Expand(norm, one) a = Div(x, e) y = Add(e, e)", True),  # nor with itself
        ("y = Expand(norm, one)", True),
    ],
)
def test_an_expand_that_its_readers_do_themselves_goes(parse, run_model, body, left):
    text = f"{HEADER} <int64[1] last = {{-1}}> {{ {NORM} {body} }}"
    before, model = parse(text), parse(text)
    for value in (out for node in model.graph for out in node.outputs if out.name in ("e", "y", "a")):
        value.shape = ir.Shape(["n", 4, 2])
    EliminateIdentity()(model)
    assert ("Expand" in [node.op_type for node in model.graph]) is left
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)}
    assert np.array_equal(run_model(model, feeds)[0], run_model(before, feeds)[0])


def test_golden(parse, as_text):
    model = parse(graph("a = Reshape(x, rows) c = Reshape(a, other) d = Relu(c) y = Reshape(d, cube)"))
    assert EliminateIdentity()(model).edits == 1
    assert as_text(model) == GOLDEN


def test_joined_reshapes_give_the_same(parse, run_model):
    body = "a = Reshape(x, rows) c = Reshape(a, other) d = Relu(c) y = Reshape(d, cube)"
    before, model = parse(graph(body)), parse(graph(body))
    EliminateIdentity()(model)
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)}
    assert np.array_equal(run_model(model, feeds)[0], run_model(before, feeds)[0])


def test_inner_reshape_read_elsewhere_stays(parse):
    header = "g (float[n,4,2] x) => (float[n,4,2] y, float[m,2] z)"
    model = parse(graph("a = Reshape(x, rows) z = Relu(a) c = Reshape(a, cube) y = Relu(c)", header))
    EliminateIdentity()(model)
    assert [node.op_type for node in model.graph] == ["Reshape", "Relu", "Relu"]


LEFT = {
    "input_to_output": (HEADER, "y = Identity(x)"),
    "real_cast": ("g (float[n,4,2] x) => (int64[n,4,2] y)", "y = Cast<to=7>(x)"),
    "real_transpose": ("g (float[n,4,2] x) => (float[n,2,4] y)", "y = Transpose<perm=[0,2,1]>(x)"),
    "unproved_reshape": ("g (float[n,t,2] x) => (float[u,v,2] y)", "a = Relu(x) y = Reshape(a, copy)"),
    "mask_read": ("g (float[n,4,2] x) => (float[n,4,2] y, bool[n,4,2] m)", "a = Relu(x) y, m = Dropout(a)"),
    "same_value_twice": ("g (float[n,4,2] x) => (float[n,4,2] y, float[n,4,2] z)", "z = Relu(x) y = Identity(z)"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(parse, name):
    header, body = LEFT[name]
    model = parse(graph(body, header))
    text = ir.to_onnx_text(model)
    assert EliminateIdentity()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_training_dropout_is_left_alone(parse):
    text = f"{HEADER} <float r = {{0.5}}, bool t = {{1}}> {{ a = Dropout(x, r, t) y = Relu(a) }}"
    assert EliminateIdentity()(parse(text)).edits == 0


def test_wrong_stage_raises(parse):
    model = parse(f"{HEADER} {{ y = Relu(x) }}")
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="eliminate-identity"):
        EliminateIdentity()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[n,4,2] x) => (float[n,4,2] y)
   <int64[3] cube =  {-1,4,2}, int64[3] other =  {-1,2,4}, int64[3] cube, int64[3] other, float[unk__1,2,4] c, float[unk__1,2,4] d>
{
   c = Reshape (x, other)
   d = Relu (c)
   y = Reshape (d, cube)
}
"""  # noqa: E501 - a line of the printer
