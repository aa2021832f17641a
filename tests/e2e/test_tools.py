"""The tools that the documentation names."""

import argparse
import importlib.util
import sys
from pathlib import Path

import onnx
import pytest

from mptqc import api
from mptqc.graph.io import save_model
from mptqc.runtime.benchmark import BenchmarkRow
from mptqc.runtime.fused_ops import matmul_counts, optimized_op_counts

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"mptqc_tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_random_vit_is_valid_and_compiles_wholly(tmp_path):
    tool = load_tool("random_vit")
    shape = tool.VitShape(image=32, patch=8, width=32, depth=2, heads=2, classes=10)
    tool.write_random_vit(tmp_path / "vit.onnx", shape)
    tool.write_random_images(tmp_path / "images.npz", shape)
    onnx.checker.check_model(onnx.load(tmp_path / "vit.onnx"), full_check=True)
    compiled = api.compile(tmp_path / "vit.onnx", tmp_path / "images.npz", preset="w4a4", options={"samples": 4})
    save_model(compiled.model, tmp_path / "out.onnx")
    counts = matmul_counts(optimized_op_counts(tmp_path / "out.onnx"))
    assert (counts.integer_matmuls, counts.float_matmuls) == (2 * (6 + 2) + 2, 0)


def test_random_vit_is_the_same_for_the_same_seed(tmp_path):
    tool = load_tool("random_vit")
    shape = tool.VitShape(image=16, patch=8, width=8, depth=1, heads=2, classes=3)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tool.write_random_vit(tmp_path / name, shape, seed)
    first, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == same != other


def test_bench_cpu_prints_a_line_a_form(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    tool = load_tool("bench_cpu")
    rows = [
        BenchmarkRow("m", 8.0, 7.0, 9.0, 8.0 / milliseconds, 10**6, 2, 1, {}, 1, 1, "cpu", 10, "cpu")
        for milliseconds in range(1, len(tool.FORMS) + 1)
    ]
    title, blank, heading, rule, *lines = tool.as_markdown("vit-s", rows).strip().splitlines()
    assert title == "vit-s, batch 1, 1 thread(s), 10 rounds, CPU time"
    assert {line.count("|") for line in (heading, rule, *lines)} == {7}
    assert [line.split(" | ")[0] for line in lines] == [f"| {form}" for form in tool.FORMS]
    assert lines[1].endswith("| 1.0 | 2 / 1 | 8.00 | 7.00..9.00 | 4.00 |")
    assert blank == ""


def test_bench_cpu_refuses_an_unknown_model(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    tool = load_tool("bench_cpu")
    assert tool.names_of_models("vit-s,swin-t") == ["vit-s", "swin-t"]
    with pytest.raises(argparse.ArgumentTypeError, match="unknown vit-x; the models are vit-s"):
        tool.names_of_models("vit-s,vit-x")
