"""Running a graph in pieces gives what running it whole gives, and keeps no more than is needed."""

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis import frontier as module
from mptqc.analysis.frontier import Frontier
from mptqc.data.arrays import Arrays, ArraySource
from mptqc.data.samples import Samples
from mptqc.graph.edit import add_initializer

TEXT = """<ir_version: 10, opset_import: ["": 21]>
g (float[B,1,2,3] x) => (float[B,1,2,3] y)
<float[1] two = {2.0}>
{
  a = Mul(x, two)
  b = Relu(a)
  c = Add(b, a)
  y = Add(c, b)
}"""


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 1, 2, 3)).astype(np.float32)


def samples_of(array: np.ndarray) -> Samples:
    return Samples(ArraySource(Arrays(array, None, "test"), None), np.arange(len(array)), None)


def value(model: ir.Model, name: str) -> ir.Value:
    return next(out for node in model.graph for out in node.outputs if out.name == name)


def run_in_pieces(array: np.ndarray) -> np.ndarray:
    model = ir.from_onnx_text(TEXT)
    frontier = Frontier(model, samples_of(array), batch=2)
    for name in ("b", "y"):
        frontier.advance([value(model, name)])
    return np.concatenate([frontier.value("y", batch) for batch in range(frontier.batches)])


def expected(array: np.ndarray) -> np.ndarray:
    doubled = 2 * array
    return doubled + 2 * np.maximum(doubled, 0)


def test_pieces_give_what_the_whole_gives() -> None:
    array = images(5)
    np.testing.assert_array_equal(run_in_pieces(array), expected(array))


def test_values_above_the_memory_limit_go_through_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY_BYTES", 100)
    array = images(5)
    np.testing.assert_array_equal(run_in_pieces(array), expected(array))


def test_a_value_that_nothing_reads_any_more_is_dropped() -> None:
    model = ir.from_onnx_text(TEXT)
    frontier = Frontier(model, samples_of(images(2)), batch=2)
    frontier.advance([value(model, "b")])
    assert frontier.value("a", 0).shape == (2, 1, 2, 3)  # c still reads it
    frontier.advance([value(model, "c")])
    frontier.advance([value(model, "y")])
    with pytest.raises(KeyError):
        frontier.value("a", 0)


def test_an_edit_downstream_is_seen() -> None:
    model = ir.from_onnx_text(TEXT)
    array = images(2)
    frontier = Frontier(model, samples_of(array), batch=2)
    frontier.advance([value(model, "c")])
    last = value(model, "y").producer()
    assert last is not None
    last.replace_input_with(1, add_initializer(model.graph, "ten", np.array([10.0], np.float32)))
    frontier.advance([value(model, "y")])
    doubled = 2 * array
    np.testing.assert_array_equal(frontier.value("y", 0), doubled + np.maximum(doubled, 0) + 10)
