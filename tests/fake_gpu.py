"""A GPU that is none: the emulated device as CUDA's runtime, our kernel library and ONNX Runtime's CUDA provider in one.

What talks to a GPU runs as it does on one, up to the numbers: the kernels' tests through the runtime's C interface,
sessions of provider "cuda" with our operators. Everything else of such a session is ONNX Runtime's CPU provider.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from cuda_kernels import GLUE, KERNELS, build_emulated

from mptqc.runtime import session
from mptqc.runtime.cuda import PATH_VARIABLE, RUNTIME_NAMES

NAME = RUNTIME_NAMES[0]
"""The library's name for the loader: whoever asks for the runtime gets it."""


@contextmanager
def fake_gpu(folder: Path) -> Iterator[Path]:
    """Pretend that there is a GPU, here and in child processes; yields the library, which is built if need be.

    Raises:
        FileNotFoundError: there is no g++.
    """
    library = folder.resolve() / NAME
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        build_emulated(library, [*KERNELS, *GLUE], soname=NAME)
    ctypes.CDLL(str(library))
    paths = [str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
    variables = {PATH_VARIABLE: str(library), "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path)}
    providers = {**session.PROVIDERS, "cuda": session.PROVIDERS["cpu"]}
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(session, "PROVIDERS", providers),
        mock.patch.object(session, "CUDA_OPTIONS", {}),
    ):
        yield library
