"""Models for the CUDA provider are refused where they cannot run there, with what to do."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fake_gpu import fake_gpu

from mptqc.errors import ModelError, ProviderError
from mptqc.reference.custom_ops import DOMAIN
from mptqc.runtime import cuda
from mptqc.runtime import session as session_module
from mptqc.runtime.diagnosis import NO_CUDA_KERNELS, diagnose
from mptqc.runtime.session import PROVIDER_KEY, create_session


@pytest.fixture
def cuda_model() -> bytes:
    node = onnx.helper.make_node("Linear", ["a"], ["y"], domain=DOMAIN)
    return model_of(node, onnx.TensorProto.UINT8)


def model_of(node: onnx.NodeProto, input_type: int, **constants: np.ndarray) -> bytes:
    """A model for CUDA of one operator that reads "a", [1], and constants."""
    graph = onnx.helper.make_graph(
        [node],
        "native",
        [onnx.helper.make_tensor_value_info("a", input_type, [1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    model.metadata_props.add(key=PROVIDER_KEY, value="cuda")
    return model.SerializeToString()


@pytest.fixture
def with_provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An onnxruntime-gpu, and no library of ours."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.delenv(cuda.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(cuda, "LIBRARY_PATH", tmp_path / "absent.so")


def test_the_cpu_refuses_a_model_for_cuda(cuda_model: bytes, tmp_path: Path):
    (tmp_path / "m.onnx").write_bytes(cuda_model)
    for model in (cuda_model, tmp_path / "m.onnx"):
        with pytest.raises(
            ProviderError, match=r"compiled for provider 'cuda' and is not run on 'cpu'.*--provider cuda"
        ):
            create_session(model)


def test_without_the_provider_the_fix_is_named(cuda_model: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=r"built without CUDAExecutionProvider.*Install onnxruntime-gpu"):
        create_session(cuda_model, provider="cuda")


@pytest.mark.usefixtures("with_provider")
def test_without_the_library_the_fix_is_named(cuda_model: bytes):
    with pytest.raises(
        ProviderError, match=r"needs mptqc's CUDA kernels.*MPTQC_CUDA=1 pip install.*MPTQC_CUDA_KERNELS"
    ):
        create_session(cuda_model, provider="cuda")


@pytest.mark.usefixtures("with_provider")
def test_a_named_library_that_is_not_there_is_an_error(cuda_model: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cuda.PATH_VARIABLE, "/nowhere/cuda.so")
    with pytest.raises(ProviderError, match=r"MPTQC_CUDA_KERNELS is /nowhere/cuda\.so, which is no file"):
        create_session(cuda_model, provider="cuda")
    assert "is no file" in diagnose().cuda_kernel_library


def test_a_named_runtime_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cuda.RUNTIME_VARIABLE, "/nowhere/libcudart.so")
    with pytest.raises(ProviderError, match=r"MPTQC_CUDA_RUNTIME is /nowhere/libcudart\.so, which does not load"):
        cuda.load_cuda_runtime()


@pytest.mark.usefixtures("with_provider")
def test_a_file_that_is_no_library_is_an_error(cuda_model: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "text.so").write_text("not a library")
    monkeypatch.setenv(cuda.PATH_VARIABLE, str(tmp_path / "text.so"))
    with pytest.raises(ProviderError, match=r"text\.so does not load.*MPTQC_CUDA=1"):
        create_session(cuda_model, provider="cuda")


@pytest.mark.usefixtures("with_provider")
def test_a_malformed_model_is_not_blamed_on_the_provider(cuda_model: bytes, monkeypatch: pytest.MonkeyPatch):
    def refuse(source, options, providers, enable_fallback):
        raise RuntimeError("ai.mptqc Linear: W must be constant")

    monkeypatch.setattr(session_module, "_register_kernels", lambda options, provider: None)
    monkeypatch.setattr(session_module, "Session", refuse)
    with pytest.raises(ModelError, match="W must be constant"):
        create_session(cuda_model, provider="cuda")


@pytest.mark.usefixtures("with_provider")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_cuda_graph_is_asked_of_the_provider(cuda_model: bytes, monkeypatch: pytest.MonkeyPatch, cuda_graph: bool):
    asked = []

    def refuse(source, options, providers, enable_fallback):
        asked.extend(providers)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(session_module, "_register_kernels", lambda options, provider: None)
    monkeypatch.setattr(session_module, "Session", refuse)
    with pytest.raises(ModelError):
        create_session(cuda_model, provider="cuda", cuda_graph=cuda_graph)
    (name, options), cpu = asked
    assert (name, cpu) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {**session_module.CUDA_OPTIONS, **({"enable_cuda_graph": "1"} if cuda_graph else {})}


@pytest.mark.usefixtures("with_provider")
def test_doctor_says_that_there_are_no_cuda_kernels():
    assert diagnose().cuda_kernel_library == NO_CUDA_KERNELS


def test_a_session_on_an_emulated_gpu_runs_our_operators(cuda_model: bytes, emulated_library: Path):
    """The way of a session to the CUDA kernels, but for the provider itself: they want more inputs of a Linear."""
    said = r"^ONNX Runtime \S+ cannot load the model in memory: \[.*ai\.mptqc::Linear:1\) has input size 1 not in"
    with fake_gpu(emulated_library), pytest.raises(ModelError, match=said):
        create_session(cuda_model, provider="cuda")


def test_a_norm_that_is_added_is_refused_by_the_cuda_library(emulated_library: Path):
    inputs, ones = ["a", "g", "g", "a"], np.ones(1, np.float32)
    node = onnx.helper.make_node("LayerNormAdd", inputs, ["y"], name="sum", domain=DOMAIN, epsilon=1e-6)
    said = r"ai\.mptqc LayerNormAdd sum: there is no such operator on this device"
    with fake_gpu(emulated_library), pytest.raises(ModelError, match=said):
        create_session(model_of(node, onnx.TensorProto.FLOAT, g=ones), provider="cuda")
