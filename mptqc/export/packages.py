"""Import torch and timm, which only exporting needs, and say what to install when they are not there."""

import importlib
import logging
import os
import socket
import urllib.request
from collections.abc import Callable
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from mptqc.errors import ModelError

logger = logging.getLogger(__name__)

INSTALL_HINT = "install it with: pip install 'mptqc[export]'"
DEFAULT_HUB = "https://huggingface.co"
NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# torch forgets the operators of a library object that is garbage-collected, so it lives as long as the process.
_kept_alive: list[object] = []


def import_torch() -> ModuleType:
    """Return the torch package.

    Raises:
        ModelError: torch is not installed or does not import here.
    """
    return _required("torch")


def import_timm() -> ModuleType:
    """Return the timm package, also where torchvision's compiled operators do not fit the installed torch.

    Raises:
        ModelError: torch or timm is not installed or does not import here.
    """
    _declare_torchvision_operators(import_torch())
    return _required("timm")


def import_transformers() -> ModuleType:
    """Return the transformers package, also beside a torchvision that does not fit the installed torch.

    Raises:
        ModelError: torch or transformers is not installed or does not import here.
    """
    _declare_torchvision_operators(import_torch())
    return _required("transformers", "install it with: pip install transformers")


def stay_offline_without_a_hub() -> None:
    """Let huggingface_hub use its cache only, when its server's name does not resolve: else it retries for a minute.

    Has to run before huggingface_hub (so timm) is imported for the first time; later it changes nothing.
    """
    if urllib.request.getproxies():
        return  # a proxy resolves the name, this machine need not
    hub = os.environ.get("HF_ENDPOINT", DEFAULT_HUB)
    try:
        socket.getaddrinfo(urlsplit(hub).hostname, 443)
    except OSError as error:
        logger.info("%s cannot be resolved (%s): only cached weights are looked for", hub, error)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _required(name: str, hint: str = INSTALL_HINT) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModelError(f"exporting needs {error.name or name}, which is not installed; {hint}.") from error
    except (ImportError, RuntimeError, OSError) as error:
        raise ModelError(
            f"exporting needs {name}, but it does not import here ({error}). Its version may not fit the installed "
            f"torch; {hint}."
        ) from error


def _declare_torchvision_operators(torch: ModuleType) -> None:
    """Declare the two operators that torchvision's Python side registers meta functions for, where they are missing.

    torchvision's wheel is built for the CUDA torch: beside a CPU torch its library does not load and its import stops
    at "operator torchvision::nms does not exist". Declared first, without a kernel, it imports; nothing calls them.
    """
    try:
        import torchvision  # noqa: F401 - the question is whether it imports
    except (ImportError, RuntimeError, OSError) as error:
        logger.debug("torchvision does not import by itself (%s): declaring its operators", error)
    else:
        return
    if _kept_alive:
        return
    library = torch.library.Library("torchvision", "DEF")
    define: Callable[[str], Any] = library.define
    for operator in ("nms", "qnms"):
        define(operator + NMS_SCHEMA)
    _kept_alive.append(library)
