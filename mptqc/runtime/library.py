"""Where the kernel library is, and whether it works here.

It holds the operators of the domain `ai.mptqc` (docs/custom-ops.md). It is built when mptqc is installed on a machine
with a C++17 compiler, and lies in this folder; MPTQC_KERNELS names another build.
"""

import ctypes
import os
from pathlib import Path

from mptqc.errors import ProviderError

PATH_VARIABLE = "MPTQC_KERNELS"
ISA_VARIABLE = "MPTQC_ISA"
LIBRARY_PATH = Path(__file__).with_name("libmptqc_kernels.so")
"""Where an installation has its own build; setup.py puts it here."""

HOW_TO_BUILD = (
    "install mptqc again where a C++17 compiler is (g++ or clang++): pip install --force-reinstall --no-deps . ; "
    f"or let {PATH_VARIABLE} name a build of the library"
)


def find_library() -> Path | None:
    """The kernel library's file; None if none was built.

    Raises:
        ProviderError: MPTQC_KERNELS is set, and names no file.
    """
    named = os.environ.get(PATH_VARIABLE)
    if not named:
        return LIBRARY_PATH if LIBRARY_PATH.is_file() else None
    path = Path(named)
    if not path.is_file():
        raise ProviderError(f"{PATH_VARIABLE} is {named}, which is no file; give the path of the kernel library.")
    return path


def load_library(path: Path) -> ctypes.CDLL:
    """Load the kernel library.

    Raises:
        ProviderError: the file is not the kernel library, or does not load here.
    """
    try:
        library = ctypes.CDLL(str(path))
        library.mptqc_isa_name.restype = ctypes.c_char_p
        _ = library.mptqc_trellis_run  # its newest function: an older build lacks it
    except (OSError, AttributeError) as error:
        named = os.environ.get(PATH_VARIABLE)
        remedy = f"{PATH_VARIABLE} names it: correct or unset that" if named == str(path) else HOW_TO_BUILD
        raise ProviderError(f"the kernel library {path} does not load ({error}); {remedy}.") from error
    return library


def chosen_isa(library: ctypes.CDLL) -> str:
    """The instruction set that the kernels use on this machine: MPTQC_ISA, or the best there is.

    Raises:
        ProviderError: MPTQC_ISA names one that this machine lacks.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    available = available_isas(library)
    if wanted and wanted not in available:
        raise ProviderError(
            f"{ISA_VARIABLE} is {wanted!r}, which the kernel library does not have on this processor. It has: "
            f"{', '.join(available)}. Name one of these, or unset it."
        )
    return wanted or available[-1]


def available_isas(library: ctypes.CDLL) -> list[str]:
    """Names of the instruction sets that the kernels can use on this machine, worst first."""
    found: list[str] = []
    isa = 0
    while (name := library.mptqc_isa_name(isa)) is not None:
        if library.mptqc_isa_runs_here(isa):
            found.append(name.decode())
        isa += 1
    return found
