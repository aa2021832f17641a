"""Rotating a residual stream changes no output, and spreads an outlier channel."""

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.streams import find_streams
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.rotate_streams import RotateStreams, rotation
from mptqc.runtime.session import create_session, run_arrays

WIDTH = 8
FLOAT32_CHAIN = 1e-5
"""Relative to the largest output: a dozen float32 sums and products of some ten terms, 6e-8 each, and their growth."""

HEADER = f'<ir_version: 10, opset_import: ["": 21]>\ng (float[B,4,{WIDTH}] x) => ({{outputs}})\n'
BODY = """{{
  m0 = MatMul(x, w0)
  a = Add(m0, b0)
  h = Add(a, position)
  n = LayerNormalization <axis = -1, epsilon = 0.000001> (h, gamma, beta)
  m1 = MatMul(n, w1)
  b = Add(m1, b1)
  r = Add(h, b)
  n2 = LayerNormalization <axis = -1, epsilon = 0.000001> (r, gamma2, beta2)
  {tail}
}}"""
SHAPES = {
    "w0": (WIDTH, WIDTH),
    "b0": (WIDTH,),
    "position": (1, 4, WIDTH),
    "gamma": (WIDTH,),
    "beta": (WIDTH,),
    "w1": (WIDTH, WIDTH),
    "b1": (WIDTH,),
    "gamma2": (WIDTH,),
    "beta2": (WIDTH,),
    "w2": (WIDTH, 3),
    "b2": (3,),
    "wide": (2 * WIDTH, 3),
}
INDICES = {"first": np.array(0), "one": np.array([1]), "four": np.array([4])}
HEAD = "m2 = MatMul(n2, w2)\n  y = Add(m2, b2)"


def make(tail: str, outputs: str = "float[] y") -> ir.Model:
    random = np.random.default_rng(0)
    model = ir.from_onnx_text(HEADER.format(outputs=outputs) + BODY.format(tail=tail))
    by_use: dict[str, list[tuple[ir.Node, int]]] = {}
    for node in model.graph:
        node.name = str(node.outputs[0].name)
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in (*SHAPES, *INDICES):
                by_use.setdefault(str(value.name), []).append((node, index))
    for name, uses in by_use.items():
        array = INDICES[name] if name in INDICES else random.standard_normal(SHAPES[name]).astype(np.float32)
        if name == "b1":
            array[2] = 40.0  # an outlier channel in the stream
        tensor = ir.tensor(array, name=name)
        value = ir.val(name, dtype=tensor.dtype, shape=ir.Shape(array.shape), const_value=tensor)
        model.graph.register_initializer(value)
        for node, index in uses:
            node.replace_input_with(index, value)
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    return model


def run(model: ir.Model, names: list[str]) -> list[np.ndarray]:
    images = np.random.default_rng(1).standard_normal((2, 4, WIDTH)).astype(np.float32)
    return run_arrays(create_session(ir.to_proto(model).SerializeToString()), names, {"x": images})


def check_equal(tail: str, outputs: str = "float[] y", names: tuple[str, ...] = ("y",)) -> ir.Model:
    before = run(make(tail, outputs), list(names))
    model = make(tail, outputs)
    assert RotateStreams(3, concrete_shapes(model))(model).edits == 1
    for true, found in zip(before, run(model, list(names)), strict=True):
        np.testing.assert_allclose(found, true, atol=FLOAT32_CHAIN * np.abs(true).max())
    return model


def test_rotation_is_orthogonal_and_keeps_the_ones() -> None:
    matrix = rotation(19, 5)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(19), atol=1e-12)
    np.testing.assert_allclose(matrix @ np.ones(19), np.ones(19), atol=1e-12)


def test_rotations_of_two_seeds_differ() -> None:
    assert np.abs(rotation(12, 0) - rotation(12, 1)).max() > 0.1


def test_output_is_unchanged_and_no_node_is_added() -> None:
    count = len(make(HEAD).graph)
    assert len(check_equal(HEAD).graph) == count


def test_outlier_channel_is_spread() -> None:
    model = make(HEAD)
    RotateStreams(3, concrete_shapes(model))(model)
    bias = next(node for node in model.graph if node.name == "b").inputs[1]
    assert bias is not None
    assert bias.const_value is not None
    assert np.abs(bias.const_value.numpy()).max() < 30.0


def test_head_of_first_token_and_mean_takes_the_rotation() -> None:
    tail = """c = Gather <axis = 1> (n2, first)
  s = Slice(n2, one, four, one)
  p = ReduceMean <keepdims = 0> (s, one)
  f = Concat <axis = 1> (c, p)
  m2 = MatMul(f, wide)
  y = Add(m2, b2)"""
    count = len(make(tail).graph)
    assert len(check_equal(tail).graph) == count


def test_stream_that_ends_the_graph_is_turned_back() -> None:
    check_equal("", "float[] n2, float[] r", ("n2", "r"))


def test_norm_with_another_reader_is_turned_back_before_it() -> None:
    model = check_equal("y = Sigmoid(n2)")
    assert sum(node.op_type == "MatMul" for node in model.graph) == 3


def test_norm_that_is_an_output_is_turned_back() -> None:
    check_equal(HEAD, "float[] y, float[] n2", ("y", "n2"))


def test_stream_that_is_an_output_is_turned_back() -> None:
    check_equal(HEAD, "float[] y, float[] r", ("y", "r"))


def test_stream_read_by_another_op_is_turned_back_before_it() -> None:
    check_equal("s = Sigmoid(r)\n  t = Add(s, n2)\n  y = ReduceMean(t)")


def test_a_model_without_norms_is_left_alone() -> None:
    model = ir.from_onnx_text(f"{HEADER.format(outputs='float[] y')}{{ y = Relu(x) }}")
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    before = ir.to_onnx_text(model)
    assert find_streams(model, concrete_shapes(model)) == []
    assert not RotateStreams(0, concrete_shapes(model))(model).modified
    assert ir.to_onnx_text(model) == before


def test_raw_model_is_refused() -> None:
    model = make(HEAD)
    del model.metadata_props[STAGE_KEY]
    with pytest.raises(StageError, match="rotate-streams"):
        RotateStreams(0, {})(model)
