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
