import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mptqc.errors import ModelError
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.convert_opset import ADAPTERS, IR_VERSION, OPSET, REFUSED, ConvertOpset

HEADER = "g (float[n,4] x) => (float[n,m] y)"
# Ops whose later versions added types, or attributes and inputs that by default mean what there was before. Read
# from onnx.defs with the test below; to be read again if OPSET is raised.
UNCHANGED = {
    *("Add", "AveragePool", "BatchNormalization", "Cast", "CastLike", "Constant", "ConstantOfShape", "CumSum"),
    *("DequantizeLinear", "Div", "Equal", "Flatten", "GRU", "GreaterOrEqual", "Identity", "If", "IsInf", "IsNaN"),
    *(
        "LSTM",
        "LeakyRelu",
        "LessOrEqual",
        "Loop",
        "LpPool",
        "Mul",
        "OptionalGetElement",
        "OptionalHasElement",
        "PRelu",
        "Pad",
        "Pow",
        "QLinearMatMul",
    ),
    *("QuantizeLinear", "RNN", "Relu", "Reshape", "Resize", "Scan", "ScatterElements", "ScatterND", "Shape", "Size"),
    *("Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
}


def test_every_op_that_changed_is_accounted_for():
    changed = set()
    for schema in onnx.defs.get_all_schemas_with_history():
        older = schema.domain == "" and 13 < schema.since_version <= OPSET and not schema.deprecated
        if older and any(
            other.name == schema.name and other.domain == "" and other.since_version < schema.since_version
            for other in onnx.defs.get_all_schemas_with_history()
        ):
            changed.add(schema.name)
    assert changed == UNCHANGED | ADAPTERS.keys() | REFUSED.keys()


def test_golden(parse, as_text):
    model = parse(f"{HEADER} {{ [mean] y = ReduceMean<axes=[-1]>(x) }}", opset=13, ir_version=7)
    assert ConvertOpset()(model).edits == 3
    assert as_text(model) == GOLDEN


CONVERTED = {
    "reduce_max": (14, "y = ReduceMax<axes=[1], keepdims=1>(x)"),
    "reduce_all": (14, "r = ReduceSumSquare(x) y = Add(x, r)"),
    "split": (13, "a, b = Split<axis=1>(x) y = Sub(a, b)"),
    "split_given": (13, "c = Constant<value = int64[2] {1,3}>() a, b = Split<axis=1>(x, c) y = Add(a, b)"),
    "pad": (13, "p = Constant<value = int64[4] {0,1,0,2}>() y = Pad(x, p)"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_same_numbers_after(parse, run_model, name):
    opset, body = CONVERTED[name]
    before, model = parse(f"{HEADER} {{ {body} }}", opset), parse(f"{HEADER} {{ {body} }}", opset)
    ConvertOpset()(model)
    assert (model.opset_imports[""], model.ir_version) == (OPSET, IR_VERSION)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}
    assert np.array_equal(run_model(model, feeds)[0], run_model(before, feeds)[0])


def test_resize_of_opset_13(parse, run_model):
    text = (
        "g (float[1,1,4,4] x) => (float[1,1,h,w] y) { s = Constant<value = float[4] {1.0,1.0,1.6,2.3}>() "
        'y = Resize<mode="cubic", coordinate_transformation_mode="pytorch_half_pixel", cubic_coeff_a=-0.75>(x, , s) }'
    )
    before, model = parse(text, opset=13), parse(text, opset=13)
    ConvertOpset()(model)
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 1, 4, 4)).astype(np.float32)}
    assert np.array_equal(run_model(model, feeds)[0], run_model(before, feeds)[0])


def test_grid_sample_modes_are_renamed(parse):
    header = "g (float[1,1,4,4] x, float[1,2,2,2] p) => (float[1,1,2,2] y)"
    model = parse(f"{header} {{ y = GridSample(x, p) }}", opset=16)
    ConvertOpset()(model)
    assert model.graph[0].attributes["mode"].as_string() == "linear"


def test_changed_meaning_is_refused_by_name(parse):
    header = "g (float[1,4,2,2] x, float[2] s, float[2] b) => (float[1,4,2,2] y)"
    model = parse(f"{header} {{ [norm] y = GroupNormalization<num_groups=2>(x, s, b) }}", opset=18)
    with pytest.raises(ModelError, match=r"GroupNormalization \(norm\) of opset 18"):
        ConvertOpset()(model)


@pytest.mark.parametrize("opset", [21, 22, 23, 24])
def test_recent_model_is_left_alone(parse, opset):
    model = parse(f"{HEADER} {{ y = Relu(x) }}", opset)
    text = ir.to_onnx_text(model)
    assert ConvertOpset()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_wrong_stage_raises(parse):
    model = parse(f"{HEADER} {{ y = Relu(x) }}")
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="convert-opset"):
        ConvertOpset()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[n,4] x) => (float[n,1] y)
   <int64[1] "mean/axes" =  {-1}, int64[1] "mean/axes">
{
   [mean] y = ReduceMean (x, "mean/axes")
}
"""
