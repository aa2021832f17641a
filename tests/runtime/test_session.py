from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from mptqc.errors import ModelError, ProviderError, RecipeError
from mptqc.runtime import session as session_module
from mptqc.runtime.session import CONFIG_ENTRIES, create_session, options_as_text, session

# float32 sums of 64 products in another order: 64 · 2⁻²⁴ of the largest partial sum (below 64 here)
FLOAT_SUM_TOLERANCE = 64 * 2**-24 * 64


def test_path_and_bytes_run_alike(linear_path: Path, weight: np.ndarray):
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    from_path = create_session(linear_path).run(None, {"x": x})[0]
    from_bytes = create_session(linear_path.read_bytes()).run(None, {"x": x})[0]
    assert np.array_equal(from_path, from_bytes)
    np.testing.assert_allclose(from_path, x @ weight, atol=FLOAT_SUM_TOLERANCE, rtol=0)


def test_options_are_pinned(linear_path: Path):
    options = create_session(linear_path, threads=2).get_session_options()
    assert {key: options.get_session_config_entry(key) for key in CONFIG_ENTRIES} == dict(CONFIG_ENTRIES)
    assert options.intra_op_num_threads == 2
    assert options.inter_op_num_threads == 1
    assert options.use_deterministic_compute
    with pytest.raises(RuntimeError):  # unset: ONNX Runtime knows no value
        options.get_session_config_entry("session.qdqisint8allowed")


def test_matmulnbits_is_float_exact(save_nodes):
    """Without accuracy level 0 a weight-only DequantizeLinear → MatMul re-quantizes its float input (1.9e-2 off)."""
    codes = np.random.default_rng(2).integers(-8, 8, size=(64, 32)).astype(np.int8)
    scale = np.full((2, 32), 2.0**-5, np.float32)
    node = onnx.helper.make_node
    path = save_nodes(
        "nbits.onnx",
        [
            node("DequantizeLinear", ["w_q", "w_scale"], ["w"], axis=0, block_size=32),
            node("MatMul", ["x", "w"], ["y"]),
        ],
        [("x", ["batch", 64])],
        [("y", ["batch", 32])],
        {"w_q": codes, "w_scale": scale},
    )
    model = onnx.load(path)
    model.opset_import[0].version = 21
    model.ir_version = 10
    x = np.random.default_rng(3).normal(size=(5, 64)).astype(np.float32)
    y = create_session(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, x @ (codes * np.float32(2.0**-5)), atol=FLOAT_SUM_TOLERANCE, rtol=0)


def test_options_as_text_names_every_entry():
    text = options_as_text(provider="cpu", threads=1)
    for key, value in CONFIG_ENTRIES.items():
        assert f"{key}={value}" in text
    assert "provider=CPUExecutionProvider" in text


def test_user_session_is_the_pinned_one(linear_path: Path):
    options = session(linear_path).get_session_options()
    assert options.get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "0"


def test_optimized_graph_is_written(linear_path: Path, tmp_path: Path):
    target = tmp_path / "optimized.onnx"
    create_session(linear_path, optimized_path=target)
    assert [node.op_type for node in onnx.load(target).graph.node] == ["MatMul"]


@pytest.mark.parametrize("provider", ["tensorrt", "CPUExecutionProvider", ""])
def test_unknown_provider_is_refused(linear_path: Path, provider: str):
    with pytest.raises(ProviderError, match="cpu, cuda"):
        create_session(linear_path, provider=provider)


def test_provider_that_is_not_built_in_is_refused(linear_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=r"built without CUDAExecutionProvider.*Install onnxruntime-gpu"):
        create_session(linear_path, provider="cuda")


def test_silent_fallback_is_an_error(linear_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ONNX Runtime hands out a CPU session when CUDA fails to start: that session is never returned."""

    def create_on_cpu(source, described, options, providers):
        return session_module.Session(source, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(session_module, "_create", create_on_cpu)
    with pytest.raises(ProviderError, match="does not start on this machine"):
        create_session(linear_path, provider="cuda")


@pytest.fixture
def cuda_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that fails as ONNX Runtime does where CUDA is installed and the GPU is not there."""
    real = session_module.Session

    def create(source, options, providers, enable_fallback):
        if providers != ["CPUExecutionProvider"]:
            raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")
        return real(source, options, providers=providers)

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(session_module, "Session", create)


@pytest.mark.usefixtures("cuda_that_raises")
def test_missing_device_is_told(linear_path: Path):
    with pytest.raises(ProviderError, match="no CUDA-capable device is detected"):
        create_session(linear_path, provider="cuda")


@pytest.mark.usefixtures("cuda_that_raises")
def test_broken_model_is_not_blamed_on_cuda(tmp_path: Path):
    (tmp_path / "text.onnx").write_text("this is text")
    with pytest.raises(ModelError, match="not an ONNX model"):
        create_session(tmp_path / "text.onnx", provider="cuda")


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"nowhere\.onnx does not exist"):
        create_session(tmp_path / "nowhere.onnx")


def test_folder_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="is a folder"):
        create_session(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is text\n"])
def test_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "text.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"text\.onnx is (empty|not an ONNX)"):
        create_session(path)


@pytest.mark.parametrize("content", [b"", b"this is text\n"])
def test_bytes_that_are_not_onnx_are_refused(content: bytes):
    with pytest.raises(ModelError, match="the model in memory"):
        create_session(content)


def test_truncated_file_is_refused(linear_path: Path):
    linear_path.write_bytes(linear_path.read_bytes()[:-40])
    with pytest.raises(ModelError, match="truncated"):
        create_session(linear_path)


def test_unknown_operator_is_reported(save_nodes):
    path = save_nodes("odd.onnx", [onnx.helper.make_node("Frobnicate", ["x"], ["y"])], [("x", [1])], [("y", [1])], {})
    with pytest.raises(ModelError, match="Frobnicate"):
        create_session(path)


def test_negative_threads_are_refused(linear_path: Path):
    with pytest.raises(RecipeError, match="threads is -1"):
        create_session(linear_path, threads=-1)
