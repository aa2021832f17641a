"""The C interface of the kernel library, called with raw pointers."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_builds import build_with_emulation
from kernel_records import (
    I32,
    I64,
    POINTER,
    Addend,
    Attention,
    LayerNorm,
    LayerNormAdd,
    Linear,
    Patches,
    Rotary,
    UnitHeads,
    c_quantizer,
)

from mptqc.reference.custom_ops import ACTIVATIONS, AttentionScales, block_weight
from mptqc.runtime.library import available_isas, find_library, load_library

OK = 0


def unaligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins one element past a cache line."""
    room = np.empty(array.nbytes + 64 + array.itemsize, np.uint8)
    start = -room.ctypes.data % 64 + array.itemsize
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def c_rotary(cosine: np.ndarray, sine: np.ndarray) -> Any:
    tokens, heads, width = cosine.shape
    return Rotary(tokens, heads * width, width, cosine.ctypes.data, sine.ctypes.data)


def table_of(rows: np.ndarray | None) -> tuple[int, int | None]:
    return (0, None) if rows is None else (rows.size, rows.ctypes.data)


class Kernels:
    """The kernels of one instruction set: numpy arrays in, numpy arrays out."""

    def __init__(self, path: Path, isa: str) -> None:
        self.path, self.library, self.isa = path, load_library(path), isa
        self.isa_number = ctypes.c_int()
        assert self.library.mptqc_choose_isa(isa.encode(), ctypes.byref(self.isa_number)) == OK

    def layer_norm(self, x, gamma, beta, epsilon, quantizer, rows=None):
        output = guarded(x.shape, np.uint8)
        width = x.shape[-1]
        arrays = [unaligned(array) for array in (x, gamma, beta)]
        pointers = [array.ctypes.data for array in arrays]
        count = x.size // width if width else 0
        arguments = LayerNorm(
            count, width, *pointers, epsilon, *table_of(rows), c_quantizer(quantizer), address(output)
        )  # fmt: skip
        self.run("layer_norm", arguments)
        return checked(output)

    def layer_norm_add(
        self, x, gamma, beta, epsilon, *, residual=None, rows=None, quantizer=None, code_rows=None, in_place=False
    ):  # fmt: skip
        """The sum, and its codes if there is a quantizer."""
        shape, width = x.shape if residual is None else residual.shape, x.shape[-1]
        output, codes = guarded(shape, np.float32), guarded(shape, np.uint8)
        arrays = [unaligned(array) for array in (x, gamma, beta)]
        residual = None if residual is None else placed(residual, output if in_place else None)
        places = None if code_rows is None else np.argsort(code_rows)
        arguments = LayerNormAdd(
            x.size // width if width else 0, width, *(array.ctypes.data for array in arrays), epsilon,
            *table_of(rows), None if residual is None else residual.ctypes.data, address(output),
            None if quantizer is None else ctypes.pointer(c_quantizer(quantizer)), *table_of(places), address(codes),
        )  # fmt: skip
        self.run("layer_norm_add", arguments)
        if quantizer is not None:
            return checked(output), checked(codes)
        assert (checked(codes) == GUARD).all()
        return checked(output)

    def span(self, weight):
        blocks = unaligned(block_weight(weight))
        return self.library.mptqc_linear_span(POINTER(blocks.ctypes.data), *map(I64, weight.shape))

    def linear(
        self, a, weight, weight_scale, bias, *, input_scale, input_zero_point, activation="none", multiplier=None,
        residual=None, rows=None, quantizer=None, weight_is_known=True, rotary=None, factor=None,
        unit_heads=None,
        by_rows=False,
        in_place=False,
    ):  # fmt: skip
        inputs, outputs = weight.shape
        blocks = unaligned(block_weight(weight))
        padding = (0, -outputs % 64)
        scale = unaligned(np.pad(np.float32(input_scale) * weight_scale, padding))
        padded_bias = unaligned(np.pad(bias, padding))
        offset = unaligned(np.zeros(scale.size, np.int32))
        self.library.mptqc_linear_offset(
            POINTER(blocks.ctypes.data), I64(inputs), I64(outputs), I32(input_zero_point), POINTER(offset.ctypes.data)
        )
        a = unaligned(a)
        shape = next((x.shape for x in (residual, factor) if x is not None), (*a.shape[:-1], outputs))
        output = guarded(shape, np.float32 if quantizer is None else np.uint8)
        factor = None if factor is None else unaligned(factor)
        residual = None if residual is None else placed(residual, output if in_place else None)
        multiplier = None if multiplier is None else unaligned(np.pad(multiplier, padding))
        c_output = None if quantizer is None else ctypes.pointer(c_quantizer(quantizer))
        tables = [] if rotary is None else [unaligned(table) for table in rotary]
        arguments = Linear(
            int(np.prod(a.shape[:-1])), inputs, outputs, a.ctypes.data, blocks.ctypes.data, offset.ctypes.data,
            scale.ctypes.data, padded_bias.ctypes.data, ACTIVATIONS.index(activation),
            None if multiplier is None else multiplier.ctypes.data,
            None if residual is None else residual.ctypes.data, 0 if rows is None else rows.size,
            None if rows is None else rows.ctypes.data, c_output, address(output),
            self.span(weight) if weight_is_known else 0, Rotary() if rotary is None else c_rotary(*tables),
            None if factor is None else factor.ctypes.data, UnitHeads(*unit_heads or (0, 0.0)), by_rows,
        )  # fmt: skip
        self.run("linear", arguments)
        return checked(output)

    def attention(
        self, q, k, v, heads, scales: AttentionScales, p_quantizer, bias=None, mask=None, quantizer=None,
        row_scale=False, by_heads=False,
    ):  # fmt: skip
        batch, rows, total = q.shape
        columns, value_total = v.shape[1:]
        q, k, v = unaligned(q), unaligned(k), unaligned(v)
        added = [None if array is None else unaligned(array) for array in (bias, mask)]
        addends = [
            Addend(None, 0, 0, 0) if array is None else Addend(array.ctypes.data, *array.shape[:3]) for array in added
        ]
        output = guarded((batch, rows, value_total), np.float32 if quantizer is None else np.uint8)
        arguments = Attention(
            batch, heads, rows, columns, total // heads, value_total // heads, q.ctypes.data, k.ctypes.data,
            v.ctypes.data, scales.q_zero_point, scales.k_zero_point, scales.v_zero_point,
            float(np.float32(scales.q_scale) * np.float32(scales.k_scale)),
            float(np.float32(p_quantizer.scale) * np.float32(scales.v_scale)), *addends, int(row_scale),
            c_quantizer(p_quantizer),
            None if quantizer is None else ctypes.pointer(c_quantizer(quantizer)), address(output), by_heads,
        )  # fmt: skip
        self.run("attention", arguments)
        return checked(output)

    def patches(self, x, patch_height, patch_width, quantizer):
        batch, channels, height, width = x.shape
        output = guarded(
            (batch, height // patch_height, width // patch_width, channels * patch_height * patch_width), np.uint8
        )
        x = unaligned(x)
        sizes = (batch, channels, height, width, patch_height, patch_width)
        self.run("patches", Patches(*sizes, x.ctypes.data, c_quantizer(quantizer), address(output)))
        return checked(output)

    def run(self, operator: str, arguments: ctypes.Structure) -> None:
        for task in range(self.tasks(operator, arguments)):
            assert self.run_task(operator, arguments, task) == OK

    def tasks(self, operator: str, arguments: ctypes.Structure) -> int:
        count = getattr(self.library, f"mptqc_{operator}_tasks")
        count.restype = I64
        return int(count(ctypes.byref(arguments)))

    def run_task(self, operator: str, arguments: ctypes.Structure, task: int) -> int:
        function = getattr(self.library, f"mptqc_{operator}_run")
        return int(function(self.isa_number, ctypes.byref(arguments), I64(task)))


GUARD_BYTES, GUARD = 64, 0xA5


def guarded(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """An output with guard bytes on either side: (the whole memory, the output in it)."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 2 * GUARD_BYTES, GUARD, np.uint8)
    return memory, memory[GUARD_BYTES : GUARD_BYTES + size].view(dtype).reshape(shape)


def address(output: tuple[np.ndarray, np.ndarray]) -> int:
    return int(output[0].ctypes.data) + GUARD_BYTES


def placed(residual: np.ndarray, output: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """A copy of the residual: where the output is to be, if that is given."""
    if output is None:
        return unaligned(residual)
    output[1][...] = residual
    return output[1]


def checked(output: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The output, after a look at its guards."""
    memory, array = output
    assert (memory[:GUARD_BYTES] == GUARD).all() and (memory[-GUARD_BYTES:] == GUARD).all()
    return array


@pytest.fixture(scope="session")
def library_path() -> Path:
    path = find_library()
    if path is None:
        pytest.skip("the kernel library was not built: no C++17 compiler")
    return path


@pytest.fixture(scope="session")
def library(library_path: Path) -> ctypes.CDLL:
    return load_library(library_path)


@pytest.fixture(scope="session")
def emulated_library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulated") / "libmptqc_kernels.so"
    return build_with_emulation(path, ["cpu", "ort", "ort/cpu"], ["-shared", "-fPIC"])


EMULATED = "emulated "


@pytest.fixture(scope="session")
def kernels_of(library_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Kernels]:
    """The kernels of an instruction set, "emulated" or real; skips where the machine lacks it."""

    def make(name: str) -> Kernels:
        emulated, isa = name.startswith(EMULATED), name.removeprefix(EMULATED)
        path = request.getfixturevalue("emulated_library_path") if emulated else library_path
        if isa not in available_isas(load_library(path)):
            pytest.skip(f"this machine has no {isa}")
        return Kernels(path, isa)

    return make


@pytest.fixture(
    params=["portable", "avx2", "avx_vnni", f"{EMULATED}avx_vnni", "avx512_vnni", "amx_int8", f"{EMULATED}amx_int8"]
)
def kernels(request: pytest.FixtureRequest, kernels_of: Callable[[str], Kernels]) -> Iterator[Kernels]:
    yield kernels_of(request.param)
