"""The tools that the documentation names."""

import importlib.util
import sys
from pathlib import Path

import onnx

from mptqc import api
from mptqc.graph.io import save_model
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
