import numpy as np
import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Stage, StageError
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


GUARD = " n = IsNaN(p) y = Where(n, nought, p)"
MASKS = (
    "<float nought = {0}, float one = {1}, float[4,2] part = {0,-3.4e38,0,0,0,0,0,0}, "
    "float[2,1] row = {0,0}, float[4,1] whole = {-3.4e38,0,0,0}>"
)


@pytest.mark.parametrize(
    ("body", "dropped"),
    [
        ("p = Softmax(x)" + GUARD, True),
        ("s = Add(x, part) p = Softmax(s)" + GUARD, True),
        ("s = Add(x, whole) p = Softmax(s)" + GUARD, False),
        ("e = Exp(x) s = Add(x, e) p = Softmax(s)" + GUARD, False),
        ("p = Softmax(x)" + GUARD.replace("nought", "one"), False),
        ("p = Exp(x)" + GUARD, False),
        ("p = Softmax(x) q = Exp(x) n = IsNaN(q) y = Where(n, nought, p)", False),
    ],
)
def test_guards_against_rows_that_are_masked_as_a_whole(parse, body, dropped):
    model = parse(f"{HEADER} {MASKS} {{ {body.replace('y = ', 'g = ')} y = Relu(g) }}")
    for name in ("part", "whole"):
        if name in model.graph.initializers:
            array = model.graph.initializers[name].const_value.numpy()
            infinite = np.where(array < -1e38, -np.inf, array).astype(np.float32)
            model.graph.initializers[name].const_value = ir.tensor(infinite, name=name)
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
