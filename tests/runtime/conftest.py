"""Tiny models, made by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

IR_VERSION = 8
OPSET = 17


def make_model(nodes, inputs, outputs, initializers) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def linear_model(weight: np.ndarray, *, batch: str | int = "batch") -> onnx.ModelProto:
    """x [batch, C] → y [batch, D]."""
    channels, classes = weight.shape
    return make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", [batch, channels])],
        [("y", [batch, classes])],
        {"w": weight.astype(np.float32)},
    )


def quantized_linear_model(weight: np.ndarray) -> onnx.ModelProto:
    """x → uint8 Q/DQ → MatMul with int8 Q/DQ weights, per output channel."""
    channels, classes = weight.shape
    scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    return make_model(
        [
            helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
            helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"]),
            helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w_dq"], axis=1),
            helper.make_node("MatMul", ["x_dq", "w_dq"], ["y"]),
        ],
        [("x", ["batch", channels])],
        [("y", ["batch", classes])],
        {
            "x_scale": np.float32(1 / 32),
            "x_zero": np.uint8(128),
            "w_q": np.rint(weight / scale).astype(np.int8),
            "w_scale": scale,
            "w_zero": np.zeros(classes, np.int8),
        },
    )


@pytest.fixture
def weight() -> np.ndarray:
    """A [64, 10] classifier."""
    return np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)


@pytest.fixture
def linear_path(tmp_path: Path, weight: np.ndarray) -> Path:
    path = tmp_path / "linear.onnx"
    onnx.save(linear_model(weight), path)
    return path


@pytest.fixture
def quantized_path(tmp_path: Path, weight: np.ndarray) -> Path:
    path = tmp_path / "quantized.onnx"
    onnx.save(quantized_linear_model(weight), path)
    return path


@pytest.fixture
def save_nodes(tmp_path: Path) -> Callable[..., Path]:
    """save_nodes(file name, nodes, inputs, outputs, initializers) → the model's path."""

    def save(name: str, *parts: object) -> Path:
        path = tmp_path / name
        onnx.save(make_model(*parts), path)
        return path

    return save
