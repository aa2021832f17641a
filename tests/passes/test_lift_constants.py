import numpy as np
import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.lift_constants import LiftConstants

HEADER = "g (float[n,2] x) => (float[n,2] y)"


def test_golden(parse, as_text):
    model = parse(f"{HEADER} {{ c = Constant<value_floats = [1.5, -2.0]>() y = Add(x, c) }}")
    assert LiftConstants()(model).edits == 1
    assert as_text(model) == GOLDEN


def test_scalar_keeps_rank_0(parse, run_model):
    model = parse(f"{HEADER} {{ c = Constant<value = float {{2.0}}>() y = Mul(x, c) }}")
    LiftConstants()(model)
    assert model.graph.initializers["c"].shape == ()
    (got,) = run_model(model, {"x": np.ones((1, 2), np.float32)})
    assert np.array_equal(got, [[2, 2]])


def test_all_readers_follow(parse):
    model = parse(f"{HEADER} {{ c = Constant<value = float {{2.0}}>() z = Mul(x, c) y = Add(z, c) }}")
    LiftConstants()(model)
    assert len(model.graph.initializers["c"].uses()) == 2


def test_second_run_changes_nothing(parse):
    model = parse(f"{HEADER} {{ c = Constant<value = float {{2.0}}>() y = Mul(x, c) }}")
    LiftConstants()(model)
    assert LiftConstants()(model).edits == 0


def test_graph_output_is_left_alone(parse):
    model = parse("g (float[n,2] x) => (float y) { y = Constant<value = float {2.0}>() }")
    text = ir.to_onnx_text(model)
    assert LiftConstants()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_wrong_stage_raises(parse):
    model = parse(f"{HEADER} {{ y = Relu(x) }}")
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="lift-constants"):
        LiftConstants()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[n,2] x) => (float[n,2] y)
   <float[2] c =  {1.5,-2}, float[2] c>
{
   y = Add (x, c)
}
"""
