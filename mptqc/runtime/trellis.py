"""Codes of weights by a trellis, in the kernel library where it is: the same codes, some ten times faster."""

import ctypes
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mptqc.reference import trellis
from mptqc.runtime.library import HOW_TO_BUILD, chosen_isa, find_library, load_library
from mptqc.runtime.machine import core_count

logger = logging.getLogger(__name__)

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_OUT_OF_MEMORY = 2
"""MPTQC_OUT_OF_MEMORY of mptqc_kernels.h."""


class _Arguments(ctypes.Structure):
    """`mptqc_trellis` of kernels/include/mptqc_kernels.h."""

    _fields_ = (
        ("rows", _I64),
        ("columns", _I64),
        ("bits", _I32),
        ("taps", _I32),
        ("first_state", _I32),
        ("values", _POINTER),
        ("input", _POINTER),
        ("importance", _POINTER),
        ("output", _POINTER),
    )


def encode(rows: NDArray[np.float32], importance: NDArray[np.float32], bits: int) -> NDArray[np.int8]:
    """`reference.trellis.encode`, with the same codes.

    Raises:
        ProviderError: MPTQC_KERNELS or MPTQC_ISA is set to what is not there.
        MemoryError: there is none left.
    """
    found = _kernels()
    if found is None:
        return trellis.encode(rows, importance, bits)
    library, isa = found
    x, weights = (np.ascontiguousarray(array, np.float32) for array in (rows, importance))
    values, codes = trellis.unsigned_table(bits), np.empty(rows.shape, np.int8)
    pointers = (array.ctypes.data for array in (values, x, weights, codes))
    arguments = _Arguments(*rows.shape, bits, trellis.TAPS[bits], trellis.first_state(bits), *pointers)

    def run(row: int) -> None:
        status = library.mptqc_trellis_run(isa, ctypes.byref(arguments), _I64(row))
        if status == _OUT_OF_MEMORY:
            raise MemoryError(f"no memory for the trellis of {rows.shape[1]} weights")
        assert status == 0, f"mptqc_trellis_run: status {status}"

    if len(rows) == 1:
        run(0)
    else:
        with ThreadPoolExecutor(core_count()) as pool:
            list(pool.map(run, range(len(rows))))
    return codes


@cache
def _kernels() -> tuple[Any, int] | None:
    """The library and the number of the instruction set that it uses here; None if none was built."""
    path = find_library()
    if path is None:
        logger.warning(
            "weights are coded by a trellis without the kernel library, which takes minutes: %s", HOW_TO_BUILD
        )
        return None
    library = load_library(path)
    isa = _I32()
    library.mptqc_choose_isa(chosen_isa(library).encode(), ctypes.byref(isa))
    return library, isa.value
