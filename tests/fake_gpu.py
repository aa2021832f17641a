"""A GPU that is none: the emulated device as CUDA runtime, kernel library and ONNX Runtime provider in one.

What talks to a GPU runs as it does on one: the kernels' tests through the runtime's C interface, sessions of provider
"cuda" with our operators. Everything else of such a session is ONNX Runtime's CPU provider.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from cuda_kernels import GLUE, KERNELS, build_emulated

from mptqc.runtime import session
from mptqc.runtime.cuda import PATH_VARIABLE, RUNTIME_VARIABLE


@contextmanager
def fake_gpu(library: Path) -> Iterator[None]:
    """Pretend that there is a GPU, here and in child processes; the emulated device's library is built if need be.

    Raises:
        FileNotFoundError: there is no g++.
    """
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        build_emulated(library, [*KERNELS, *GLUE])
    variables = dict.fromkeys((PATH_VARIABLE, RUNTIME_VARIABLE), str(library.resolve()))
    providers = {**session.PROVIDERS, "cuda": session.PROVIDERS["cpu"]}
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(session, "PROVIDERS", providers),
        mock.patch.object(session, "CUDA_OPTIONS", {}),
    ):
        yield
