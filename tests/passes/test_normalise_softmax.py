import numpy as np
import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.infer_shapes import InferShapes
from mptqc.passes.normalise_softmax import NormaliseSoftmax

HEADER = "g (float[n,4,2] x) => (float[n,4,2] y)"


@pytest.mark.parametrize("body", ["y = Softmax<axis=2>(x)", "y = Softmax(x)"])
def test_last_axis_becomes_minus_one(parse, body):
    model = parse(f"{HEADER} {{ {body} }}")
    assert NormaliseSoftmax()(model).edits == 1
    assert model.graph[0].attributes["axis"].as_int() == -1


def test_golden(parse, as_text):
    model = parse(f"{HEADER} {{ z = Softmax<axis=2>(x) y = Softmax<axis=1>(z) }}")
    NormaliseSoftmax()(model)
    assert as_text(model) == GOLDEN


@pytest.mark.parametrize("axis", [-1, 1, -2])
def test_left_alone(parse, axis):
    model = parse(f"{HEADER} {{ y = Softmax<axis={axis}>(x) }}")
    text = ir.to_onnx_text(model)
    assert NormaliseSoftmax()(model).edits == 0
    assert ir.to_onnx_text(model) == text


PRODUCT = "m = MatMul(x, w) "
GUARD = " n = IsNaN(p) y = Where(n, nought, p)"
MASKS = (
    "<float[2,2] w = {1,2,3,4}, float nought = {0}, float one = {1}, float[4,2] part = {0,-3.4e38,0,0,0,0,0,0}, "
    "float[4,2] other = {-3.4e38,0,0,0,0,0,0,0}, float[4,1] row = {0,0,0,0}, float[4,1] whole = {-3.4e38,0,0,0}, "
    "int64[2] rows = {-1,2}, int64[3] cube = {-1,4,2}, int64[2] wide = {-1,8}>"
)


@pytest.mark.parametrize(
    ("body", "dropped"),
    [
        (PRODUCT + "p = Softmax(m)" + GUARD, True),
        (PRODUCT + "s = Add(m, part) p = Softmax(s)" + GUARD, True),
        (PRODUCT + "t = Mul(m, one) s = Add(part, t) u = Div(s, one) p = Softmax(u)" + GUARD, True),
        (PRODUCT + "s = Add(m, part) t = Add(s, row) p = Softmax(t)" + GUARD, True),
        (PRODUCT + "s = Add(m, part) r = Reshape(s, rows) t = Reshape(r, cube) p = Softmax(t)" + GUARD, True),
        (PRODUCT + "s = Add(m, whole) p = Softmax(s)" + GUARD, False),
        (PRODUCT + "s = Add(m, part) t = Add(s, other) p = Softmax(t)" + GUARD, False),  # a row of both together
        (PRODUCT + "s = Add(m, whole) t = Mul(s, one) p = Softmax(t)" + GUARD, False),
        (PRODUCT + "s = Add(m, part) r = Reshape(s, wide) t = Reshape(r, cube) p = Softmax(t)" + GUARD, False),
        (PRODUCT + "k = Greater(part, row) s = Where(k, m, row) p = Softmax(s)" + GUARD, False),
        (PRODUCT + "e = Exp(x) s = Add(m, e) p = Softmax(s)" + GUARD, False),
        ("p = Softmax(x)" + GUARD, False),  # may be anything
        (PRODUCT + "p = Softmax(m)" + GUARD.replace("nought", "one"), False),
        ("p = Exp(x)" + GUARD, False),
        (PRODUCT + "p = Softmax(m) q = Exp(x) n = IsNaN(q) y = Where(n, nought, p)", False),
    ],
)
def test_guards_against_rows_that_are_masked_as_a_whole(parse, body, dropped):
    model = parse(f"{HEADER} {MASKS} {{ {body.replace('y = ', 'g = ')} y = Relu(g) }}")
    for name in ("part", "other", "whole"):
        if name in model.graph.initializers:
            array = model.graph.initializers[name].const_value.numpy()
            infinite = np.where(array < -1e38, -np.inf, array).astype(np.float32)
            model.graph.initializers[name].const_value = ir.tensor(infinite, name=name)
    InferShapes()(model)
    NormaliseSoftmax()(model)
    assert ("IsNaN" not in [node.op_type for node in model.graph]) is dropped


def test_wrong_stage_raises(parse):
    model = parse(f"{HEADER} {{ y = Softmax(x) }}")
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="normalise-softmax"):
        NormaliseSoftmax()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[n,4,2] x) => (float[n,4,2] y)
   <float[n,4,2] z>
{
   z = Softmax <axis: int = -1> (x)
   y = Softmax <axis: int = 1> (z)
}
"""
