"""Where the library of CUDA kernels is, and whether it works here.

It holds the operators of the domain `ai.mptqc` for ONNX Runtime's CUDA provider (docs/cuda.md). It is built where nvcc
is, when MPTQC_CUDA=1 asks for it, and lies in this folder; MPTQC_CUDA_KERNELS names another build.
"""

import ctypes
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from mptqc.errors import ProviderError

PATH_VARIABLE = "MPTQC_CUDA_KERNELS"
LIBRARY_PATH = Path(__file__).with_name("libmptqc_cuda.so")
"""Where an installation has its own build; setup.py puts it here."""
RUNTIME_VARIABLE = "MPTQC_CUDA_RUNTIME"
RUNTIME_NAMES = ("libcudart.so.13", "libcudart.so")

HOW_TO_BUILD = (
    "install mptqc again where CUDA 13's nvcc is: MPTQC_CUDA=1 pip install --force-reinstall --no-deps . ; "
    f"or let {PATH_VARIABLE} name a build of the library"
)


def find_cuda_library() -> Path | None:
    """The file of the CUDA kernels; None if none was built.

    Raises:
        ProviderError: MPTQC_CUDA_KERNELS is set, and names no file.
    """
    named = os.environ.get(PATH_VARIABLE)
    if not named:
        return LIBRARY_PATH if LIBRARY_PATH.is_file() else None
    path = Path(named)
    if not path.is_file():
        raise ProviderError(f"{PATH_VARIABLE} is {named}, which is no file; give the path of the CUDA kernel library.")
    return path


def load_cuda_library(path: Path) -> ctypes.CDLL:
    """Load the library of CUDA kernels.

    Raises:
        ProviderError: the file is not that library, or does not load here.
    """
    try:
        library = ctypes.CDLL(str(path))
        library.mptqc_cuda_failure.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise ProviderError(f"the CUDA kernel library {path} does not load ({error}); {HOW_TO_BUILD}.") from error
    return library


def load_cuda_runtime() -> ctypes.CDLL:
    """The CUDA runtime of this machine, for memory and timing.

    It is what MPTQC_CUDA_RUNTIME names, else the loader's, the toolkit's or a wheel's.

    Raises:
        ProviderError: there is none.
    """
    named = os.environ.get(RUNTIME_VARIABLE)
    for name in (named,) if named else (*RUNTIME_NAMES, *_runtime_files()):
        try:
            return ctypes.CDLL(str(name))
        except OSError:
            continue
    if named:
        raise ProviderError(f"{RUNTIME_VARIABLE} is {named}, which does not load; give the path of libcudart.so.13.")
    raise ProviderError(f"no CUDA runtime found (looked for {', '.join(RUNTIME_NAMES)}); install CUDA 13.")


def _runtime_files() -> list[Path]:
    compiler = shutil.which("nvcc")
    toolkits = [] if compiler is None else [Path(compiler).resolve().parents[1]]
    wheels = find_spec("nvidia")
    packages = [] if wheels is None else [Path(folder) for folder in wheels.submodule_search_locations or ()]
    found = [toolkit / "lib64" / name for toolkit in toolkits for name in RUNTIME_NAMES]
    return found + [file for folder in packages for file in sorted(folder.glob("*/lib/libcudart.so.*"))]
