from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from mptqc.errors import ModelError, RecipeError
from mptqc.runtime.benchmark import MIN_ROUNDS, WARM_UP_RUNS, benchmark, interleaved


@pytest.fixture
def heavy(save_nodes) -> Path:
    """16 products of 256 × 256 on the same input as `light`, which has one."""
    eye = np.eye(256, dtype=np.float32)
    names = ["x", *(f"h{k}" for k in range(15)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    return save_nodes("heavy.onnx", nodes, [("x", ["batch", 64, 256])], [("y", ["batch", 64, 256])], {"w": eye})


@pytest.fixture
def light(save_nodes) -> Path:
    eye = np.eye(256, dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return save_nodes("light.onnx", [node], [("x", ["batch", 64, 256])], [("y", ["batch", 64, 256])], {"w": eye})


def test_rows_are_in_order_against_the_first(heavy: Path, light: Path):
    first, second = benchmark([heavy, light], repeats=15, batch=2)
    assert (first.model, second.model) == (str(heavy), str(light))
    assert first.speedup == 1.0
    assert second.speedup > 4  # 16 products against one, with a wide margin for a busy machine
    assert second.median_ms < first.median_ms
    for row in (first, second):
        assert 0 < row.p10_ms <= row.median_ms <= row.p90_ms
        assert (row.batch, row.threads, row.provider, row.rounds, row.clock) == (2, 1, "cpu", 15, "cpu")


def test_what_ran_is_counted(linear_path: Path, quantized_path: Path):
    float_row, integer_row = benchmark([linear_path, quantized_path], repeats=1)
    assert (float_row.integer_matmuls, float_row.float_matmuls, float_row.fused_ops) == (0, 1, {"MatMul": 1})
    assert (integer_row.integer_matmuls, integer_row.float_matmuls) == (1, 0)


def test_rounds_follow_the_time(linear_path: Path):
    assert benchmark([linear_path], min_seconds=0)[0].rounds == MIN_ROUNDS
    assert benchmark([linear_path], min_seconds=0.05)[0].rounds > MIN_ROUNDS


def test_runs_take_turns():
    order: list[str] = []

    def run(name: str, nanoseconds: int) -> int:
        first_of_turn = order[-1:] != [name]
        order.append(name)
        return 9 * nanoseconds if first_of_turn else nanoseconds

    found = interleaved([lambda: run("a", 2_000_000), lambda: run("b", 500_000)], 0, repeats=3)
    assert "".join(order) == "a" * WARM_UP_RUNS + "b" * WARM_UP_RUNS + "aabb" * 3
    assert found.tolist() == [[2.0, 0.5]] * 3


def test_several_threads_use_wall_time(linear_path: Path):
    assert benchmark([linear_path], threads=2, repeats=1)[0].clock == "wall"


def test_external_data_counts_in_the_file_size(heavy: Path, tmp_path: Path):
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(heavy), outside, save_as_external_data=True, location="outside.data", size_threshold=0)
    row = benchmark([outside], repeats=1)[0]
    assert row.file_bytes == outside.stat().st_size + (tmp_path / "outside.data").stat().st_size
    assert row.file_bytes > 256 * 256 * 4


def test_missing_external_data_is_named(heavy: Path, tmp_path: Path):
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(heavy), outside, save_as_external_data=True, location="outside.data", size_threshold=0)
    (tmp_path / "outside.data").unlink()
    with pytest.raises(ModelError, match=r"outside\.data"):
        benchmark([outside], repeats=1)


def test_file_that_is_not_onnx(tmp_path: Path):
    (tmp_path / "a.onnx").write_text("text, not a model")
    with pytest.raises(ModelError, match=r"a\.onnx"):
        benchmark([tmp_path / "a.onnx"])


@pytest.fixture
def dynamic(save_nodes) -> Path:
    shape = ["batch", 3, "height", "width"]
    return save_nodes("dynamic.onnx", [helper.make_node("Relu", ["x"], ["y"])], [("x", shape)], [("y", shape)], {})


def test_dynamic_dimensions_come_from_shape(dynamic: Path):
    assert benchmark([dynamic], shape=(3, 8, 8), repeats=1)[0].rounds == 1


def test_dynamic_dimensions_without_shape(dynamic: Path):
    with pytest.raises(RecipeError, match=r"\[\?, 3, \?, \?\] has dynamic dimensions beside the batch.*--shape"):
        benchmark([dynamic])


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 8), (3, 0, 8)])
def test_shape_that_does_not_fit(dynamic: Path, shape: tuple[int, ...]):
    with pytest.raises(RecipeError, match="--shape"):
        benchmark([dynamic], shape=shape)


def test_fixed_batch_of_another_size(save_nodes):
    path = save_nodes("fixed.onnx", [helper.make_node("Relu", ["x"], ["y"])], [("x", [1, 4])], [("y", [1, 4])], {})
    with pytest.raises(RecipeError, match="fixed batch of 1, not 8"):
        benchmark([path], batch=8)


@pytest.mark.parametrize(
    "options", [{"batch": 0}, {"repeats": 0}, {"min_seconds": -1.0}, {"min_seconds": float("nan")}]
)
def test_options_out_of_range(linear_path: Path, options: dict):
    with pytest.raises(RecipeError, match=next(iter(options))):
        benchmark([linear_path], **options)


def test_no_model():
    with pytest.raises(RecipeError, match="no model"):
        benchmark([])


def test_progress_counts_rounds(linear_path: Path):
    calls = []
    benchmark([linear_path], repeats=3, progress=lambda *call: calls.append(call))
    assert calls == [("benchmark", 1, 3), ("benchmark", 2, 3), ("benchmark", 3, 3)]
