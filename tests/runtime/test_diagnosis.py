import pytest

from mptqc.runtime import diagnosis
from mptqc.runtime.diagnosis import BROKEN, SATURATION_WARNING, ProviderState, diagnose


def test_avx2_without_vnni_is_warned_about(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnosis, "cpu_info", lambda: {"flags": "avx2", "model name": "Old CPU"})
    found = diagnose()
    assert found.processor == "Old CPU"
    assert SATURATION_WARNING in found.warnings


def test_unknown_cpu_is_not_warned_about(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnosis, "cpu_info", dict)
    found = diagnose()
    assert found.cpu_features is None
    assert SATURATION_WARNING not in found.warnings


def test_both_onnxruntimes_are_warned_about(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnosis, "_installed_version", lambda name: "1.0")
    assert any("overwrite each other" in warning for warning in diagnose().warnings)


def test_absent_export_packages_come_with_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnosis, "_installed_version", lambda name: None if name in ("torch", "timm") else "1.0")
    missing = [item for item in diagnose().missing if "torch, timm" in item.what]
    assert [item.how for item in missing] == ["pip install 'mptqc[export]'"]


def test_broken_cuda_library_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnosis, "_provider_state", lambda name: ProviderState(True, True, None))
    monkeypatch.setattr(diagnosis, "_cuda_kernel_library", lambda: f"{BROKEN}: no such file")
    assert any("a CUDA kernel library that works" in item.what for item in diagnose().missing)
