import numpy as np
import onnx
from onnx import helper, numpy_helper
from resident_memory import resident_bytes_of

ROWS, COLUMNS = 2048, 4096


def resident(path, rows):
    """Of a model that looks up one of `rows` rows."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["i"], to=onnx.TensorProto.INT64),
            helper.make_node("Gather", ["w", "i"], ["y"]),
        ],
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((rows, COLUMNS), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return resident_bytes_of(path, (1, 1))


def test_weights_are_counted_once(tmp_path):
    weights = resident(tmp_path / "large.onnx", ROWS) - resident(tmp_path / "small.onnx", 1)
    assert 0.9 < weights / (4 * ROWS * COLUMNS) < 1.5
