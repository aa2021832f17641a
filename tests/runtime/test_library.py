"""The kernel library is found, or its absence is told with what to do."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from mptqc.errors import ModelError, ProviderError
from mptqc.reference.custom_ops import DOMAIN
from mptqc.runtime import library as library_module
from mptqc.runtime.diagnosis import NO_KERNELS, diagnose
from mptqc.runtime.library import ISA_VARIABLE, PATH_VARIABLE, chosen_isa, find_library, load_library
from mptqc.runtime.session import create_session


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.setattr(library_module, "LIBRARY_PATH", tmp_path / "absent.so")


@pytest.fixture
def path() -> Path:
    found = find_library()
    if found is None:
        pytest.skip("the kernel library was not built: no C++17 compiler")
    return found


@pytest.fixture
def native_model() -> bytes:
    node = onnx.helper.make_node("Linear", ["a"], ["y"], domain=DOMAIN)
    kind, shape = onnx.TensorProto, [1]
    graph = onnx.helper.make_graph(
        [node],
        "native",
        [onnx.helper.make_tensor_value_info("a", kind.UINT8, shape)],
        [onnx.helper.make_tensor_value_info("y", kind.FLOAT, shape)],
    )
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(DOMAIN, 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()


def test_a_model_that_needs_the_library_says_how_to_get_it(no_library, native_model: bytes):
    with pytest.raises(ModelError, match=r"uses the operators of ai\.mptqc.*C\+\+17 compiler.*MPTQC_KERNELS"):
        create_session(native_model)


def test_other_models_run_without_the_library(no_library, linear_path: Path):
    x = np.ones((1, 64), np.float32)
    assert create_session(linear_path).run(None, {"x": x})[0].shape == (1, 10)


def test_doctor_says_that_the_library_is_missing(no_library):
    found = diagnose()
    assert found.kernel_library == NO_KERNELS
    assert any("kernel library" in item.what and "compiler" in item.how for item in found.missing)


def test_doctor_names_the_library_and_its_instruction_set(path: Path):
    found = diagnose()
    assert found.kernel_library == f"{path}, runs on {chosen_isa(load_library(path))}"
    assert not any("kernel library" in item.what for item in found.missing)


def test_a_named_library_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, native_model: bytes):
    monkeypatch.setenv(PATH_VARIABLE, "/nowhere/kernels.so")
    with pytest.raises(ProviderError, match=r"MPTQC_KERNELS is /nowhere/kernels\.so, which is no file"):
        create_session(native_model)
    found = diagnose()
    assert "is no file" in found.kernel_library
    assert any("kernel library that works" in item.what for item in found.missing)


def test_a_file_that_is_no_library_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native_model: bytes):
    (tmp_path / "text.so").write_text("not a library")
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "text.so"))
    with pytest.raises(ProviderError, match=r"text\.so does not load.*correct or unset that"):
        create_session(native_model)


def test_the_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch, path: Path):
    monkeypatch.setenv(ISA_VARIABLE, "portable")
    assert chosen_isa(load_library(path)) == "portable"


def test_an_instruction_set_that_the_processor_lacks_is_an_error(
    monkeypatch: pytest.MonkeyPatch, path: Path, native_model: bytes
):
    monkeypatch.setenv(ISA_VARIABLE, "avx1024")
    with pytest.raises(ProviderError, match=r"MPTQC_ISA is 'avx1024'.* It has: portable"):
        create_session(native_model)
