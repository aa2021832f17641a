import onnx
from random_vit import VitShape, write_random_images, write_random_vit

from mptqc import api
from mptqc.graph.io import save_model
from mptqc.runtime.fused_ops import matmul_counts, optimized_op_counts


def test_random_vit_is_valid_and_compiles_wholly(tmp_path):
    shape = VitShape(image=32, patch=8, width=32, depth=2, heads=2, classes=10)
    write_random_vit(tmp_path / "vit.onnx", shape)
    write_random_images(tmp_path / "images.npz", shape)
    onnx.checker.check_model(onnx.load(tmp_path / "vit.onnx"), full_check=True)
    compiled = api.compile(tmp_path / "vit.onnx", tmp_path / "images.npz", preset="w4a4", options={"samples": 4})
    save_model(compiled.model, tmp_path / "out.onnx")
    counts = matmul_counts(optimized_op_counts(tmp_path / "out.onnx"))
    assert (counts.integer_matmuls, counts.float_matmuls) == (2 * (6 + 2) + 2, 0)


def test_random_vit_is_the_same_for_the_same_seed(tmp_path):
    shape = VitShape(image=16, patch=8, width=8, depth=1, heads=2, classes=3)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_vit(tmp_path / name, shape, seed)
    first, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == same != other
