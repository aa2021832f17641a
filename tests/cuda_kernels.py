"""The CUDA kernels with numpy arrays in and out, on a GPU or on the emulated device of tests/kernels/emulated."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from kernel_records import Addend, Attention, LayerNorm, Linear, Patches, c_quantizer

from mptqc.reference.custom_ops import ACTIVATIONS, AttentionScales, block_weight

ROOT = Path(__file__).parents[1]
EMULATED = ROOT / "tests/kernels/emulated"
EMULATOR_OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden")
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
GUARD_BYTES, GUARD = 256, 0xA5
OK, INVALID_ARGUMENT = 0, 1
FLOAT_TYPES = {"float32": 0, "float16": 1}
TILES = {"auto": 0, "64x64": 1, "128x128": 2, "32x128": 3, "64x128": 4, "288x128": 5}
WHOLE_CHUNKS = ("32x128", "64x128", "288x128")
"""Tiles whose inputs lie on 16 bytes, in every row."""


KERNELS = tuple(source for source in sorted((ROOT / "kernels/cuda").glob("*.cu")) if source.name != "device.cu")
GLUE = (*sorted((ROOT / "kernels/ort").glob("*.cpp")), *sorted((ROOT / "kernels/ort/cuda").glob("*.cpp")))


def build_emulated(path: Path, sources: Sequence[Path]) -> None:
    """Compile code for the emulated device into a library, with a part of CUDA's runtime.

    Raises:
        FileNotFoundError: there is no g++.
        subprocess.CalledProcessError: it does not compile.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no g++")
    device = [EMULATED / "emulated.cpp", EMULATED / "runtime.cpp", ROOT / "kernels/cpu/arguments.cpp"]
    folders = [EMULATED, *(ROOT / "kernels" / name for name in ("include", "cuda", "ort/cuda"))]
    include = [f"-I{folder}" for folder in folders]
    options = [*EMULATOR_OPTIONS, "-DMPTQC_EMULATED", *include]
    command = [compiler, *options, "-x", "c++", *device, *sources, "-o", path]
    subprocess.run(command, check=True)


class Memory(Protocol):
    """Where the kernels' arrays lie."""

    def take(self, content: np.ndarray) -> int:
        """The address of a copy of these bytes, on 256 bytes."""
        ...

    def read(self, address: int, size: int) -> np.ndarray:
        """`size` bytes from `address` on, once all kernels are done."""
        ...


class HostMemory:
    """Of the emulated device."""

    def __init__(self) -> None:
        self.kept: list[np.ndarray] = []

    def take(self, content: np.ndarray) -> int:
        room = np.empty(content.nbytes + 256, np.uint8)
        start = -room.ctypes.data % 256
        room[start : start + content.nbytes] = content
        self.kept.append(room)
        return int(room.ctypes.data) + start

    def read(self, address: int, size: int) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).copy()


class DeviceMemory:
    """Of the current GPU, through the CUDA runtime; freed with the object."""

    def __init__(self, runtime: ctypes.CDLL) -> None:
        self.runtime = runtime
        self.kept: list[int] = []

    def take(self, content: np.ndarray) -> int:
        address = ctypes.c_void_p()
        self.check(self.runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(max(content.nbytes, 1))))
        assert address.value is not None
        self.kept.append(address.value)
        self.copy(address.value, content.ctypes.data, content.nbytes, HOST_TO_DEVICE)
        return address.value

    def read(self, address: int, size: int) -> np.ndarray:
        self.check(self.runtime.cudaDeviceSynchronize())
        content = np.empty(size, np.uint8)
        self.copy(content.ctypes.data, address, size, DEVICE_TO_HOST)
        return content

    def copy(self, to: int, source: int, size: int, kind: int) -> None:
        self.check(self.runtime.cudaMemcpy(ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), kind))

    def check(self, error: int) -> None:
        assert error == 0, f"CUDA error {error}"

    def __del__(self) -> None:
        for address in self.kept:
            self.runtime.cudaFree(ctypes.c_void_p(address))


class CudaKernels:
    """numpy arrays in, numpy arrays out.

    `shift` moves every array that need not be aligned by so many bytes from 256, whole elements only.
    """

    def __init__(self, library: ctypes.CDLL, memory: type[HostMemory] | Any, *, shift: int = 0) -> None:
        self.library, self.new_memory, self.shift = library, memory, shift

    def shifted(self, shift: int) -> "CudaKernels":
        return CudaKernels(self.library, self.new_memory, shift=shift)

    def layer_norm(self, x, gamma, beta, epsilon, quantizer, rows=None):
        memory = self.new_memory()
        count = x.size // x.shape[-1] if x.shape[-1] else 0
        table = (0, None) if rows is None else (rows.size, self.put(memory, rows))
        output = Output(memory, x.shape, np.uint8, self.shift)
        pointers = [self.put(memory, array) for array in (x, gamma, beta)]
        arguments = LayerNorm(count, x.shape[-1], *pointers, epsilon, *table, c_quantizer(quantizer), output.address)
        assert self.call("layer_norm", arguments, FLOAT_TYPES[x.dtype.name]) == OK
        return output.array()

    def linear(
        self, a, weight, weight_scale, bias, *, input_scale, input_zero_point, activation="none", multiplier=None,
        residual=None, rows=None, quantizer=None, tile="auto",
    ):  # fmt: skip
        memory = self.new_memory()
        inputs, outputs = weight.shape
        padding = (0, -outputs % 64)
        offset = np.pad(-input_zero_point * weight.sum(0, dtype=np.int32), padding)
        scale = np.pad(np.float32(input_scale) * weight_scale, padding)
        aligned = [memory.take(as_bytes(x)) for x in (block_weight(weight), offset, scale, np.pad(bias, padding))]
        shape = (*a.shape[:-1], outputs) if residual is None else residual.shape
        float_type = np.dtype(np.float32) if residual is None else residual.dtype
        output = Output(memory, shape, float_type if quantizer is None else np.uint8, self.shift)
        if tile in WHOLE_CHUNKS and (inputs % 16 or inputs == 0 or self.shift % 16):
            pytest.skip("this tile takes whole chunks")
        arguments = Linear(
            int(np.prod(a.shape[:-1])), inputs, outputs, self.put(memory, a), *aligned,
            ACTIVATIONS.index(activation),
            None if multiplier is None else memory.take(as_bytes(np.pad(multiplier, padding))),
            None if residual is None else self.put(memory, residual),
            0 if rows is None else rows.size, None if rows is None else self.put(memory, rows),
            None if quantizer is None else ctypes.pointer(c_quantizer(quantizer)), output.address,
        )  # fmt: skip
        self.run_linear(arguments, float_type.name, tile)
        return output.array()

    def attention(
        self, q, k, v, heads, scales: AttentionScales, p_quantizer, bias=None, mask=None, quantizer=None,
        row_scale=False,
    ):  # fmt: skip
        memory = self.new_memory()
        batch, rows, total = q.shape
        columns, value_total = v.shape[1:]
        addends = [
            Addend(None, 0, 0, 0) if array is None else Addend(self.put(memory, array), *array.shape[:3])
            for array in (bias, mask)
        ]
        output = Output(memory, (batch, rows, value_total), np.float32 if quantizer is None else np.uint8, self.shift)
        arguments = Attention(
            batch, heads, rows, columns, total // heads, value_total // heads,
            *[self.put(memory, codes) for codes in (q, k, v)], scales.q_zero_point, scales.k_zero_point,
            scales.v_zero_point, float(np.float32(scales.q_scale) * np.float32(scales.k_scale)),
            float(np.float32(p_quantizer.scale) * np.float32(scales.v_scale)), *addends, row_scale,
            c_quantizer(p_quantizer),
            None if quantizer is None else ctypes.pointer(c_quantizer(quantizer)), output.address,
        )  # fmt: skip
        assert self.call("attention", arguments) == OK
        return output.array()

    def patches(self, x, patch_height, patch_width, quantizer):
        memory = self.new_memory()
        batch, channels, height, width = x.shape
        shape = (batch, height // patch_height, width // patch_width, channels * patch_height * patch_width)
        output = Output(memory, shape, np.uint8, self.shift)
        sizes = (batch, channels, height, width, patch_height, patch_width)
        arguments = Patches(*sizes, self.put(memory, x), c_quantizer(quantizer), output.address)
        assert self.call("patches", arguments) == OK
        return output.array()

    def run_linear(self, arguments: Linear, float_type: str, tile: str) -> None:
        """Skips the test if the device is none of those that have the tile."""
        status = self.call("linear", arguments, FLOAT_TYPES[float_type], TILES[tile])
        if status == INVALID_ARGUMENT and tile in WHOLE_CHUNKS and self.new_memory is not HostMemory:
            pytest.skip("only Hopper's devices have this tile")
        assert status == OK

    def call(
        self, operator: str, arguments: ctypes.Structure, *more: int, stream: ctypes.c_void_p | None = None
    ) -> int:
        function = getattr(self.library, f"mptqc_cuda_{operator}")
        return int(function(ctypes.byref(arguments), *more, stream or ctypes.c_void_p(None)))

    def put(self, memory: Memory, array: np.ndarray) -> int:
        shift = self.shift // array.itemsize * array.itemsize
        return memory.take(np.concatenate([np.full(shift, GUARD, np.uint8), as_bytes(array)])) + shift


class Output:
    """Memory for an output with guard bytes on either side."""

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: Any, shift: int) -> None:
        self.memory, self.shape, self.dtype = memory, shape, np.dtype(dtype)
        self.before = GUARD_BYTES + shift // self.dtype.itemsize * self.dtype.itemsize
        self.size = int(np.prod(shape)) * self.dtype.itemsize
        self.start = memory.take(np.full(self.before + self.size + GUARD_BYTES, GUARD, np.uint8))
        self.address = self.start + self.before

    def array(self) -> np.ndarray:
        """The output, after a look at its guards."""
        content = self.memory.read(self.start, self.before + self.size + GUARD_BYTES)
        assert (content[: self.before] == GUARD).all() and (content[self.before + self.size :] == GUARD).all()
        return content[self.before : self.before + self.size].view(self.dtype).reshape(self.shape)


def as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)
