import pytest

from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.infer_shapes import InferShapes


def test_shapes_and_types_are_filled_in(parse):
    model = parse("g (float[n,3,4] x) => (float[n,4,3] y) { z = Transpose<perm=[0,2,1]>(x) y = Relu(z) }")
    value = model.graph[0].outputs[0]
    value.shape, value.type = None, None
    assert InferShapes()(model).modified
    assert value.shape == ("n", 4, 3)
    assert value.dtype == model.graph.inputs[0].dtype
    assert not InferShapes()(model).modified


def test_wrong_stage_raises(parse):
    model = parse("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="infer-shapes"):
        InferShapes()(model)
