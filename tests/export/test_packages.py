import os
import socket
import sys

import pytest

from mptqc.errors import ModelError
from mptqc.export.packages import import_timm, import_torch, stay_offline_without_a_hub


@pytest.fixture
def direct_network(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that the variable is put back after the test
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return monkeypatch


def unresolved(*_: object, **__: object) -> list[object]:
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize("missing", ["torch", "timm"])
def test_missing_package_is_named_with_the_install_command(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModelError, match=rf"{missing}.*pip install 'mptqc\[export\]'"):
        import_timm()


def test_timm_imports_here() -> None:
    pytest.importorskip("torch")
    assert import_timm().is_model("vit_small_patch16_224")
    assert import_torch().__name__ == "torch"


def test_unresolved_hub_means_offline(direct_network: pytest.MonkeyPatch) -> None:
    direct_network.setattr(socket, "getaddrinfo", unresolved)
    stay_offline_without_a_hub()
    assert os.environ.get("HF_HUB_OFFLINE") == "1"


def test_resolved_hub_changes_nothing(direct_network: pytest.MonkeyPatch) -> None:
    direct_network.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    stay_offline_without_a_hub()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_proxy_changes_nothing(direct_network: pytest.MonkeyPatch) -> None:
    direct_network.setattr(socket, "getaddrinfo", unresolved)
    direct_network.setattr("urllib.request.getproxies", lambda: {"https": "proxy:3128"})
    stay_offline_without_a_hub()
    assert "HF_HUB_OFFLINE" not in os.environ
