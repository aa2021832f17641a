from pathlib import Path

import numpy as np
import onnx

from mptqc.runtime.fused_ops import MatmulCounts, graph_op_counts, matmul_counts, optimized_op_counts


def test_float_linear_stays_a_float_matmul(linear_path: Path):
    counts = optimized_op_counts(linear_path)
    assert counts == {"MatMul": 1}
    assert matmul_counts(counts) == MatmulCounts(integer_matmuls=0, float_matmuls=1)


def test_quantized_linear_is_fused_to_integers(quantized_path: Path):
    counts = optimized_op_counts(quantized_path)
    assert "DequantizeLinear" not in counts
    assert matmul_counts(counts) == MatmulCounts(integer_matmuls=1, float_matmuls=0)


def test_unoptimized_graph_is_counted_as_written(quantized_path: Path):
    counts = optimized_op_counts(quantized_path, graph_optimization=False)
    assert counts == {"DequantizeLinear": 2, "MatMul": 1, "QuantizeLinear": 1}


def test_bytes_are_counted_like_the_file(quantized_path: Path):
    assert optimized_op_counts(quantized_path.read_bytes()) == optimized_op_counts(quantized_path)


def test_subgraphs_are_counted():
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    y = info("y", onnx.TensorProto.FLOAT, [1])
    branch = onnx.helper.make_graph([node("Relu", ["x"], ["y"])], "branch", [], [y])
    graph = onnx.helper.make_graph(
        [node("If", ["condition"], ["z"], then_branch=branch, else_branch=branch)],
        "main",
        [info("x", onnx.TensorProto.FLOAT, [1]), info("condition", onnx.TensorProto.BOOL, [])],
        [info("z", onnx.TensorProto.FLOAT, [1])],
    )
    assert graph_op_counts(graph) == {"Relu": 2, "If": 1}


def test_folded_weights_do_not_count(save_nodes):
    """A product of constants is computed when the session is created, so it is not one the model runs."""
    eye = np.eye(4, dtype=np.float32)
    node = onnx.helper.make_node
    path = save_nodes(
        "folded.onnx",
        [node("MatMul", ["a", "b"], ["w"]), node("MatMul", ["x", "w"], ["y"])],
        [("x", [2, 4])],
        [("y", [2, 4])],
        {"a": eye, "b": 2 * eye},
    )
    assert optimized_op_counts(path) == {"MatMul": 1}
