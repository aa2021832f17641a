"""Speed of the int8 Linear kernel by itself, against the fastest int8 product that the machine shows."""

import ctypes
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from cuda_kernels import FLOAT_TYPES, TILES, DeviceMemory, as_bytes
from kernel_records import Linear, c_quantizer

from mptqc.reference.custom_ops import CodeQuantizer, block_weight
from mptqc.runtime.cuda import find_cuda_library, load_cuda_library, load_cuda_runtime

SHAPES: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {  # rows, inputs, outputs
        "8192 x 8192 x 8192": (8192, 8192, 8192),
        "ViT-B q, batch 64": (64 * 197, 768, 768),
        "ViT-B fc1, batch 64": (64 * 197, 768, 3072),
        "ViT-B fc2, batch 64": (64 * 197, 3072, 768),
        "ViT-B fc1, batch 1": (197, 768, 3072),
    }
)
TIMED_TILES = MappingProxyType({"as chosen": "auto", "64x64": "64x64", "128x128": "128x128"})
"""By their columns; the first is what a model runs."""
REPEATS = 20


def measure_products(shapes: Mapping[str, tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    """Tera-operations a second (a multiply and an add are two) of each shape and tile; cuBLASLt's through torch.

    LinearQuantize as it is, and with GELU, as fc1 has it.

    Raises:
        ProviderError: there is no CUDA runtime.
        RuntimeError: the kernels were not built, there is no GPU, or a kernel failed.
    """
    library, runtime = open_kernels()
    for name, shape in shapes.items():
        work = 2 * float(np.prod([float(size) for size in shape]))
        row: dict[str, Any] = {"product": name, "cuBLASLt s8": as_tops(work, torch_ms(*shape))}
        for column, tile in TIMED_TILES.items():
            for gelu in (False, True):
                milliseconds = kernel_ms(library, runtime, shape, tile, gelu=gelu)
                row[column + ", GELU" * gelu] = as_tops(work, milliseconds)
        yield row


def open_kernels() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The library of kernels, and CUDA's runtime.

    Raises:
        ProviderError: there is no CUDA runtime.
        RuntimeError: the kernels were not built, or there is no GPU.
    """
    path = find_cuda_library()
    if path is None:
        raise RuntimeError("the CUDA kernels are not built; run the stage `build` first")
    library, runtime = load_cuda_library(path), load_cuda_runtime()
    if not library.mptqc_cuda_device_count():
        raise RuntimeError("there is no GPU, or its driver is older than CUDA 13")
    return library, runtime


def as_tops(operations: float, milliseconds: float | None) -> float | None:
    """Tera-operations a second."""
    return None if milliseconds is None else round(operations / milliseconds / 1e9, 1)


def kernel_ms(
    library: ctypes.CDLL, runtime: ctypes.CDLL, shape: tuple[int, int, int], tile: str, *, gelu: bool
) -> float:
    """Milliseconds of one LinearQuantize on random codes; shape: rows, inputs, outputs."""
    rows, inputs, outputs = shape
    generator = np.random.default_rng(0)
    memory = DeviceMemory(runtime)
    codes = generator.integers(0, 256, (rows, inputs), np.uint8)
    weight = generator.integers(-128, 128, (inputs, outputs)).astype(np.int8)
    padded = -(-outputs // 64) * 64
    arrays = [
        memory.take(as_bytes(array))
        for array in (codes, block_weight(weight), np.zeros(padded, np.int32), np.full(padded, 1e-4, np.float32),
                      np.zeros(padded, np.float32), np.zeros(rows * outputs, np.uint8))
    ]  # fmt: skip
    arguments = Linear(
        rows, inputs, outputs, *arrays[:5], int(gelu), None, None, 0, None,
        ctypes.pointer(c_quantizer(CodeQuantizer(0.04, 120))), arrays[5],
    )  # fmt: skip

    def run() -> None:
        if library.mptqc_cuda_linear(ctypes.byref(arguments), FLOAT_TYPES["float32"], TILES[tile], None):
            raise RuntimeError(f"the Linear kernel failed: {library.mptqc_cuda_failure().decode()}")

    events = [ctypes.c_void_p(), ctypes.c_void_p()]
    for event in events:
        memory.check(runtime.cudaEventCreate(ctypes.byref(event)))
    for _ in range(REPEATS):
        run()
    memory.check(runtime.cudaEventRecord(events[0], None))
    for _ in range(REPEATS):
        run()
    memory.check(runtime.cudaEventRecord(events[1], None))
    memory.check(runtime.cudaEventSynchronize(events[1]))
    elapsed = ctypes.c_float()
    memory.check(runtime.cudaEventElapsedTime(ctypes.byref(elapsed), *events))
    return elapsed.value / REPEATS


def torch_ms(rows: int, inputs: int, outputs: int) -> float | None:
    """Milliseconds of cuBLASLt's signed int8 product; None without torch or without a GPU that it sees."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    left = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, device="cuda")
    right = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, device="cuda").t()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(REPEATS):
        torch._int_mm(left, right)
    start.record()
    for _ in range(REPEATS):
        torch._int_mm(left, right)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / REPEATS
