"""Where the kernel library is, and whether it works here.

The library holds the operators of the domain `ai.mptqc` (docs/custom-ops.md). It is built when mptqc is installed on a
machine with a C++17 compiler, and lies in this folder; MPTQC_KERNELS names another build.
"""

import ctypes
import os
from pathlib import Path

from mptqc.errors import ProviderError

PATH_VARIABLE = "MPTQC_KERNELS"
ISA_VARIABLE = "MPTQC_ISA"
LIBRARY_PATH = Path(__file__).with_name("libmptqc_kernels.so")
"""Where an installation puts its own build; setup.py writes it here."""

HOW_TO_BUILD = (
    "install mptqc again where a C++17 compiler is (g++ or clang++): pip install --force-reinstall --no-deps ., or let "
    f"{PATH_VARIABLE} name a build of the library"
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


def chosen_isa(path: Path) -> str:
    """The instruction set that the library's kernels use on this machine: MPTQC_ISA, or the best there is.

    Raises:
        ProviderError: the library does not load, or MPTQC_ISA names one that this machine lacks.
    """
    try:
        library = ctypes.CDLL(str(path))
        choose, name = library.mptqc_choose_isa, library.mptqc_isa_name
    except (OSError, AttributeError) as error:
        raise ProviderError(f"the kernel library {path} does not load ({error}); {HOW_TO_BUILD}.") from error
    name.restype = ctypes.c_char_p
    wanted = os.environ.get(ISA_VARIABLE, "")
    isa = ctypes.c_int()
    if choose(wanted.encode(), ctypes.byref(isa)) != 0:
        raise ProviderError(
            f"{ISA_VARIABLE} is {wanted!r}, which the kernel library does not have on this processor. It has: "
            f"{', '.join(available_isas(library))}."
        )
    return _text(name(isa.value))


def available_isas(library: ctypes.CDLL) -> list[str]:
    """Names of the instruction sets that the library can use on this machine, worst first."""
    name = library.mptqc_isa_name
    name.restype = ctypes.c_char_p
    found = []
    isa = 0
    while (text := name(isa)) is not None:
        if library.mptqc_isa_runs_here(isa):
            found.append(_text(text))
        isa += 1
    return found


def _text(value: bytes) -> str:
    return value.decode()
