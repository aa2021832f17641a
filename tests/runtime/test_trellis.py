"""The kernel library codes weights as the reference does, on every instruction set; without it the reference does."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from mptqc.reference import trellis as reference
from mptqc.runtime import library as library_module
from mptqc.runtime import trellis
from mptqc.runtime.library import ISA_VARIABLE, PATH_VARIABLE, available_isas, find_library, load_library

INVALID = 1


@pytest.fixture(autouse=True)
def no_memory_of_libraries():
    trellis._kernels.cache_clear()
    yield
    trellis._kernels.cache_clear()


def isas():
    path = find_library()
    return [] if path is None else available_isas(load_library(path))


def rows_of(bits, rows, columns):
    random = np.random.default_rng(100 * bits + columns)
    heavy = random.standard_t(3, (rows, columns)) * reference.deviation(bits)
    return heavy.astype(np.float32), random.uniform(0.1, 10, columns).astype(np.float32)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", sorted(reference.TAPS))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 200), (5, 2), (3, 67), (0, 8)])
def test_the_library_gives_the_codes_of_the_reference(monkeypatch, isa, bits, rows, columns):
    monkeypatch.setenv(ISA_VARIABLE, isa)
    x, importance = rows_of(bits, rows, columns)
    assert np.array_equal(trellis.encode(x, importance, bits), reference.encode(x, importance, bits))


def test_rows_that_are_not_in_one_piece_are_read_right():
    x, importance = rows_of(4, 6, 40)
    strided, order = x[::2, ::-1], importance[::-1]
    assert np.array_equal(trellis.encode(strided, order, 4), reference.encode(strided, order, 4))


def test_without_a_library_the_reference_codes(monkeypatch, caplog, tmp_path: Path):
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.setattr(library_module, "LIBRARY_PATH", tmp_path / "absent.so")
    called = []
    monkeypatch.setattr(reference, "encode", lambda *arguments: called.append(arguments) or np.zeros((1, 3), np.int8))
    assert trellis.encode(np.zeros((1, 3), np.float32), np.ones(3, np.float32), 4).shape == (1, 3)
    assert len(called) == 1
    assert "without the kernel library" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 1}, {"bits": 6}, {"taps": 2}, {"taps": 7}, {"first_state": 4096}, {"first_state": -1}, {"rows": -1}],
)
def test_arguments_that_are_not_sound_are_refused(wrong):
    path = find_library()
    if path is None:
        pytest.skip("the kernel library was not built: no C++17 compiler")
    values, x, ones, codes = (
        np.zeros(size, dtype) for size, dtype in ((4096, np.float32), (8, np.float32), (8, np.float32), (8, np.int8))
    )
    numbers = {"rows": 1, "columns": 8, "bits": 4, "taps": 3, "first_state": 0, **wrong}
    pointers = (array.ctypes.data for array in (values, x, ones, codes))
    arguments = ctypes.byref(trellis._Arguments(*numbers.values(), *pointers))
    library = load_library(path)
    assert library.mptqc_trellis_tasks(arguments) == 0
    assert library.mptqc_trellis_run(0, arguments, ctypes.c_int64(0)) == INVALID
