from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mptqc.graph.edit import constant_of
from mptqc.graph.float_streams import find_streams
from mptqc.graph.io import serialize
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.use_float16 import UseFloat16

MakeModel = Callable[..., ir.Model]
HEAD = "g (float[n,4] x) => (OUTPUTS) <float[4] p = {CONSTANT, 2, 3, 4}, float[4] g = {1,1,1,1}, int8[1,1,1,1] w = {1}>"
BODY = """
  e = Add(x, p)
  c = ai.mptqc.LayerNormQuantize(e, g, g)
  r = ai.mptqc.Linear(c, w, g, g, e)
  d = ai.mptqc.LayerNormQuantize(r, g, g)
"""
"""Two norms and a residual; attributes do not matter to the pass."""


@pytest.fixture
def make() -> MakeModel:
    def from_text(tail: str = "y = Relu(r)", outputs: str = "float[n,4] y", body: str = BODY, constant: float = 1):
        head = HEAD.replace("OUTPUTS", outputs).replace("CONSTANT", str(constant))
        opsets = '<ir_version: 10, opset_import: ["": 21, "ai.mptqc": 1]>'
        model = ir.from_onnx_text(f"{opsets}\n{head} {{{body}{tail}}}")
        for node in model.graph:
            node.outputs[0].dtype = ir.DataType.UINT8 if "Quantize" in node.op_type else ir.DataType.FLOAT
        model.metadata_props[STAGE_KEY] = Stage.LOWERED
        return model

    return from_text


def readers(model: ir.Model) -> list[tuple[str, list[str]]]:
    return [(node.op_type, [str(value.name) for value in node.inputs if value is not None]) for node in model.graph]


def test_a_stream_runs_in_float16_between_two_casts(make: MakeModel):
    model = make()
    assert UseFloat16()(model).edits == 1
    assert readers(model) == [
        ("Cast", ["x"]),
        ("Add", ["x/float16_output", "p_1"]),
        ("LayerNormQuantize", ["e", "g", "g"]),
        ("Linear", ["c", "w", "g", "g", "e"]),
        ("Cast", ["r"]),
        ("LayerNormQuantize", ["r", "g", "g"]),
        ("Relu", ["r/float_output"]),
    ]
    types = {str(value.name): value.dtype for node in model.graph for value in node.outputs}
    assert {name for name, dtype in types.items() if dtype == ir.DataType.FLOAT16} == {"x/float16_output", "e", "r"}
    constant = constant_of(model.graph[1].inputs[1])
    assert constant is not None
    assert (constant.dtype, constant.tolist()) == (np.float16, [1, 2, 3, 4])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_second_run_finds_nothing(make: MakeModel):
    model = make()
    UseFloat16()(model)
    before = serialize(model)
    assert not UseFloat16()(model).modified
    assert serialize(model) == before


def test_outputs_of_the_graph_keep_name_and_type(make: MakeModel):
    model = make(tail="", outputs="float[n,4] r, uint8[n,4] d")
    assert UseFloat16()(model).edits == 1
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [
        ("r", ir.DataType.FLOAT),
        ("d", ir.DataType.UINT8),
    ]
    assert readers(model)[-2:] == [("Cast", ["r_replaced"]), ("LayerNormQuantize", ["r_replaced", "g", "g"])]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_what_has_a_float32_maker_is_read_there_without_a_cast_back(make: MakeModel):
    model = make(tail="s = Relu(x) y = Add(s, s)")
    assert UseFloat16()(model).edits == 1
    assert ("Relu", ["x"]) in readers(model)
    assert [op for op, _ in readers(model)].count("Cast") == 1


def test_a_shape_is_read_of_either_type(make: MakeModel):
    model = make(tail="y = Shape(r)", outputs="int64[2] y")
    assert UseFloat16()(model).edits == 1
    assert readers(model)[-1] == ("Shape", ["r"])


SMALL = "c = ai.mptqc.LayerNormQuantize(x, g, g) d = ai.mptqc.LayerNormQuantize(x, g, g) r = Add(x, x) "
UNTOUCHED = {
    "as many casts as operators": {"body": SMALL},
    "a constant beyond float16": {"constant": 70000},
    "no operator": {"body": "r = Add(x, p) "},
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_it_is_left_alone_for(make: MakeModel, case: str):
    model = make(**UNTOUCHED[case])
    before = serialize(model)
    assert not UseFloat16()(model).modified
    assert serialize(model) == before


def test_a_linear_without_residual_writes_float32(make: MakeModel):
    model = make(body=BODY + "f = ai.mptqc.Linear(d, w, g, g) h = ai.mptqc.LayerNormQuantize(f, g, g) ")
    first, second = find_streams(model)
    assert [value.name for value in second.made_elsewhere] == ["f"]
    assert first.operators == 3
    UseFloat16()(model)
    assert ("LayerNormQuantize", ["f", "g", "g"]) in readers(model)


def test_a_model_that_is_not_lowered_is_refused(make: MakeModel):
    model = make()
    model.metadata_props[STAGE_KEY] = Stage.QUANTIZED
    with pytest.raises(StageError, match="use-float16"):
        UseFloat16()(model)
