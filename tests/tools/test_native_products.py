import numpy as np
import onnx
import pytest
from native_products import PeakError, Product, native_products, peak_meter, products_of
from onnx import helper, numpy_helper

from mptqc.reference.custom_ops import DOMAIN, CodeQuantizer
from mptqc.runtime.library import find_library


def event(name, operator, duration, inputs, output):
    shapes = {"input_type_shape": [{"uint8": dims} for dims in inputs], "output_type_shape": [{"float": output}]}
    return {"name": f"{name}_kernel_time", "dur": duration, "args": {"op_name": operator, **shapes}}


def linear(name, duration):
    return event(name, "Linear", duration, [[2, 5, 12], [1, 3, 16, 4], [7], [7]], [10, 7])


ATTENTION = event("attention", "AttentionQuantize", 40, [[2, 5, 12], [2, 9, 12], [2, 9, 6]], [2, 5, 6])


def test_the_shortest_time_of_each_operator_counts():
    session = {"name": "model_run", "dur": 999, "args": {}}
    events = [session, linear("a", 3000), linear("b", 1000), linear("a", 2000), linear("b", 1500), ATTENTION]
    assert products_of(events) == [
        Product("Linear", "10 × 12 × 7", 2, 3.0, 2 * 2 * 10 * 12 * 7),
        Product("AttentionQuantize", "2 × 5 × 9 × 12", 1, 0.04, 2 * 2 * 5 * 9 * (12 + 6)),
    ]


def test_other_operators_have_no_operations():
    (found,) = products_of([event("norm", "LayerNormQuantize", 500, [[2, 5, 12], [12], [12]], [2, 5, 12])])
    assert found == Product("LayerNormQuantize", "2 × 5 × 12", 1, 0.5, 0)


def test_a_model_is_profiled(tmp_path, monkeypatch):
    if find_library() is None:
        pytest.skip("the kernel library was not built: no C++17 compiler")
    attributes = {"patch_height": 2, "patch_width": 3, **CodeQuantizer(0.1, 0, 0, 204, (1,), (4,)).attributes("output")}
    nodes = [
        helper.make_node("QuantizePatches", ["x"], ["codes"], name="patches", domain=DOMAIN, **attributes),
        helper.make_node("MatMulInteger", ["codes", "w"], ["y"], name="product"),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 1, 4, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT32, None)],
        [numpy_helper.from_array(np.ones((6, 2), np.int8), "w")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    found = {product.operator: product for product in native_products(tmp_path / "model.onnx", (3, 1, 4, 6), runs=2)}
    assert found["QuantizePatches"].shape == "3 × 2 × 2 × 6"
    assert found["QuantizePatches"].milliseconds >= 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_the_peak_of_an_unknown_instruction_set_is_refused(tmp_path):
    with pytest.raises(PeakError, match="the peak of portable is not measured here"):
        peak_meter("portable", tmp_path)
