import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes, input_shape
from mptqc.errors import ModelError


def parse(body: str, header: str = "g (float[n,3,4] x) => (float[k] y)", constants: str = "") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{header} <{constants}> {{\n{body}\n}}')


def test_every_value_of_the_model_has_its_shape():
    body = (
        "t = Transpose<perm=[2,0,1]>(x)\ns = Shape(t)\nr = ReduceSum<keepdims=0>(x)\n"
        "a, b = Split<axis=0, num_outputs=2>(t)\ny = Relu(b)"
    )
    assert concrete_shapes(parse(body), batch=5) == {
        "x": (5, 3, 4),
        "t": (4, 5, 3),
        "s": (3,),
        "r": (),
        "a": (2, 5, 3),
        "b": (2, 5, 3),
        "y": (2, 5, 3),
    }


def test_the_batch_is_one_unless_told():
    assert concrete_shapes(parse("y = Relu(x)"))["y"] == (1, 3, 4)


def test_a_fixed_batch_wins():
    model = parse("y = Relu(x)", "g (float[7,3,4] x) => (float[7,3,4] y)")
    assert concrete_shapes(model, batch=2)["y"] == (7, 3, 4)


def test_a_model_that_runs_at_batch_1_alone_is_told_so():
    body, constants = "y = Reshape(x, one)", "int64[3] one = {1,4,3}"
    assert concrete_shapes(parse(body, constants=constants))["y"] == (1, 4, 3)
    with pytest.raises(ModelError, match=r"'x' leaves the batch open, .* not run at batch 2: export .* fixed batch"):
        concrete_shapes(parse(body, constants=constants), batch=2)


def test_shapes_that_depend_on_computed_numbers():
    body = "s = Shape<start=1, end=2>(x)\nw = Concat<axis=0>(s, minus)\ny = Reshape(x, w)"
    assert concrete_shapes(parse(body, constants="int64[1] minus = {-1}"), batch=2)["y"] == (3, 8)


def test_the_model_is_not_edited():
    model = parse("y = Relu(x)")
    text = ir.to_onnx_text(model)
    concrete_shapes(model)
    assert ir.to_onnx_text(model) == text


def test_a_whole_vit_at_two_batch_sizes(tiny_vit):
    model = tiny_vit()
    one, three = concrete_shapes(model), concrete_shapes(model, batch=3)
    assert three["logits"] == (3, 10)
    assert one["scores0"] == (1, 2, 5, 5)
    assert {name: (3, *shape[1:]) for name, shape in one.items() if shape[0] == 1 and "turned" not in name} == {
        name: three[name] for name, shape in one.items() if shape[0] == 1 and "turned" not in name
    }


@pytest.mark.parametrize("header", ["g (float[n,3,height] x) => (float[k] y)", "g (float[n,3,?] x) => (float[k] y)"])
def test_an_open_dimension_other_than_the_batch_is_an_error(header):
    with pytest.raises(ModelError, match=r"'x'.*only its first dimension"):
        concrete_shapes(parse("y = Relu(x)", header))


def test_an_unknown_rank_is_an_error():
    with pytest.raises(ModelError, match="'x'"):
        input_shape(ir.val("x", dtype=ir.DataType.FLOAT), 1)


def test_a_number_is_kept_and_a_name_is_filled_in():
    assert input_shape(ir.val("x", shape=ir.Shape(["n", 3, 8, 8])), 4) == (4, 3, 8, 8)
    assert input_shape(ir.val("x", shape=ir.Shape([2, 3, 8, 8])), 4) == (2, 3, 8, 8)


def test_the_result_does_not_depend_on_the_data(tiny_vit):
    assert concrete_shapes(tiny_vit(seed=0)) == concrete_shapes(tiny_vit(seed=1))
    assert all(
        isinstance(dim, int) and not isinstance(dim, np.integer) for dim in concrete_shapes(tiny_vit())["logits"]
    )
