import numpy as np
import onnx_ir as ir
import pytest

from mptqc.errors import ModelError
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.freeze_shapes import FreezeShapes

HEADER = "g (float[batch,6,4] x) => (float[batch,6,4] y)"
CONSTANTS = (
    "int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64[1] a0 = {0}, int64[1] a1 = {1}, int64[1] a3 = {3}, "
    "int64[1] two = {2}, int64[1] six = {6}, int64 i3 = {3}, int64[1] minus = {-1}, float[1,1,4] token = {1,2,3,4}"
)
BATCH = "s = Shape(x) n = Gather(s, i0) n1 = Unsqueeze(n, a0) "
# [batch, 6, 4] → [batch, 6, 2, 2], the last axis left to Reshape; the width of a head gives the scale.
HEADS = (
    BATCH
    + "t = Gather(s, i1) t1 = Unsqueeze(t, a0) target = Concat<axis=0>(n1, t1, two, minus) h = Reshape(x, target) "
    "hs = Shape(h) d = Slice(hs, a3, minus_end) f = Cast<to=1>(d) r = Sqrt(f) v = Div(h, r) "
    "joined = Concat<axis=0>(n1, t1, minus) y = Reshape(v, joined)"
)
TOKEN = (
    BATCH + "ones = Concat<axis=0>(n1, minus, minus) yes = Equal(ones, all) w = Where(yes, unit, ones) "
    "e = Expand(token, w) y = Concat<axis=1>(e, x)"
)
WINDOWS = (
    BATCH + "three = Mul(n, i3) k = Unsqueeze(three, a0) rest = Concat<axis=0>(k, two, minus) z = Reshape(x, rest) "
    "back = Concat<axis=0>(n1, six, minus) y = Reshape(z, back)"
)


def graph(body: str, header: str = HEADER) -> str:
    more = "int64[1] minus_end = {1000}, int64[3] all = {-1,-1,-1}, int64[3] unit = {1,1,1}"
    return f"{header} <{CONSTANTS}, {more}> {{ {body} }}"


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (HEADS, ["Reshape", "Div", "Reshape"]),
        (TOKEN, ["Shape", "Concat", "Expand", "Concat"]),
        (WINDOWS, ["Reshape", "Reshape"]),
    ],
    ids=["heads", "token", "windows"],
)
def test_shape_arithmetic_goes(parse, run_model, body, expected, batch):
    header = HEADER.replace("float[batch,6,4] y", "float[batch,rows,4] y")
    before, model = parse(graph(body, header)), parse(graph(body, header))
    assert FreezeShapes()(model).edits > 0
    assert ops(model) == expected
    feeds = {"x": np.random.default_rng(0).normal(size=(batch, 6, 4)).astype(np.float32)}
    (wanted,), (got,) = run_model(before, feeds), run_model(model, feeds)
    assert np.array_equal(got, wanted)


def test_golden(parse, as_text):
    model = parse(graph(HEADS))
    FreezeShapes()(model)
    assert as_text(model) == GOLDEN


def test_dimensions_are_multiples_of_the_batch(parse):
    model = parse(graph(WINDOWS))
    FreezeShapes()(model)
    assert model.graph[0].outputs[0].shape == ("3*batch", 2, 4)


def test_weights_are_left_as_they_are(parse):
    weight = ",".join(["0.5"] * 4 * 100)
    text = f"g (float[batch,4] x) => (float[batch,100] y) <float[4,100] W = {{{weight}}}> {{ y = MatMul(x, W) }}"
    model = parse(text)
    before = ir.to_onnx_text(model)
    assert FreezeShapes()(model).edits == 0
    assert ir.to_onnx_text(model) == before


def test_second_run_changes_nothing(parse):
    model = parse(graph(TOKEN, HEADER.replace("float[batch,6,4] y", "float[batch,7,4] y")))
    FreezeShapes()(model)
    text = ir.to_onnx_text(model)
    assert FreezeShapes()(model).edits == 0
    assert ir.to_onnx_text(model) == text


@pytest.mark.parametrize(
    "header",
    [
        "g (float[2,6,4] x) => (float[2,6,4] y)",
        "g (float[batch,rows,4] x) => (float[batch,rows,4] y)",
        "g (float[batch,6,4] x, int64[k] other) => (float[batch,6,4] y)",
    ],
    ids=["fixed_batch", "open_rows", "two_inputs"],
)
def test_left_alone(parse, header):
    model = parse(graph(HEADS, header))
    text = ir.to_onnx_text(model)
    assert FreezeShapes()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_target_open_on_two_axes_stays_computed(parse):
    body = BATCH + "target = Concat<axis=0>(n1, minus, n1) y = Reshape(x, target)"
    model = parse(graph(body, "g (float[batch,6,4] x) => (float[batch,k,m] y)"))
    assert FreezeShapes()(model).edits == 0
    assert "Concat" in ops(model)


def test_invalid_model_is_refused(parse):
    model = parse(graph("y = MatMul(x)"))
    with pytest.raises(ModelError, match="not valid ONNX"):
        FreezeShapes()(model)


def test_wrong_stage_raises(parse):
    model = parse(graph(HEADS))
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="freeze-shapes"):
        FreezeShapes()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[batch,6,4] x) => (float[batch,6,4] y)
   <float[1] r =  {1.4142135}, int64[4] "h/target" =  {-1,6,2,2}, int64[3] "y/target" =  {-1,6,4}, float[1] r, int64[4] "h/target", int64[3] "y/target", float[batch,6,2,2] h, float[batch,6,2,2] v>
{
   h = Reshape (x, "h/target")
   v = Div (h, r)
   y = Reshape (v, "y/target")
}
"""  # noqa: E501 - a line of the printer
