"""The kernels of a ViT's blocks one after another, from a CUDA graph, without ONNX Runtime around them."""

import ctypes
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from cuda_kernels import FLOAT_TYPES, TILES, DeviceMemory, as_bytes
from kernel_records import Addend, Attention, LayerNorm, Linear, c_quantizer
from random_vit import VitShape

from gpu.products import open_kernels
from mptqc.reference.custom_ops import CodeQuantizer

REPEATS, REPLAYS, ROUNDS = 20, 10, 5
"""Of a kernel in its graph, of a graph in a round, and rounds, whose median counts; a rehearsal does each once."""
CAPTURE_OF_THIS_THREAD = 1
ACTIVATION = CodeQuantizer(0.03, 128)
PROBABILITY = CodeQuantizer(1 / 255, 0)
Kernel = Callable[[ctypes.c_void_p], int]


class Chain:
    """The kernels of a ViT's blocks for one batch: random codes of 8 bits, q, k and v a Linear each, float16 between.

    Attributes:
        kernels: in their order, nine a block, with a name each.
    """

    def __init__(self, library: ctypes.CDLL, runtime: ctypes.CDLL, shape: VitShape, batch: int) -> None:
        self.library, self.memory = library, DeviceMemory(runtime)
        self.generator = np.random.default_rng(0)
        self.kernels: list[tuple[str, Kernel]] = []
        tokens = (shape.image // shape.patch) ** 2 + 1
        rows, width = batch * tokens, shape.width
        self.no_bias = self.put(np.zeros(4 * width, np.float32))
        self.gamma = self.put(np.ones(width, np.float32))
        codes = [self.put(self.random((rows, width))) for _ in range(5)]  # normed, q, k, v, context
        hidden = self.put(self.random((rows, 4 * width)))
        stream = [self.put(self.generator.standard_normal((rows, width)).astype(np.float16)) for _ in range(2)]
        for _ in range(shape.depth):
            self.add("norm", self.norm(rows, width, stream[0], codes[0]))
            for target in codes[1:4]:
                self.add("q", self.linear(rows, width, width, codes[0], target))
            self.add("attention", self.attention(batch, tokens, shape, codes[1:4], codes[4]))
            self.add("proj", self.linear(rows, width, width, codes[4], stream[1], residual=stream[0]))
            self.add("norm", self.norm(rows, width, stream[1], codes[0]))
            self.add("fc1", self.linear(rows, width, 4 * width, codes[0], hidden, gelu=True))
            self.add("fc2", self.linear(rows, 4 * width, width, hidden, stream[0], residual=stream[1]))

    def random(self, shape: tuple[int, ...]) -> np.ndarray:
        """Codes."""
        return self.generator.integers(0, 256, shape, np.uint8)

    def put(self, array: np.ndarray) -> int:
        """The address of a copy on the device."""
        return self.memory.take(as_bytes(array))

    def add(self, name: str, record: tuple[str, ctypes.Structure, Sequence[int]]) -> None:
        """A kernel as it is called on a stream."""
        operator, arguments, more = record
        function = getattr(self.library, f"mptqc_cuda_{operator}")
        self.kernels.append((name, lambda stream: int(function(ctypes.byref(arguments), *more, stream))))

    def norm(self, rows: int, width: int, x: int, y: int) -> tuple[str, ctypes.Structure, Sequence[int]]:
        """A LayerNormQuantize."""
        record = LayerNorm(rows, width, x, self.gamma, self.no_bias, 1e-6, 0, None, c_quantizer(ACTIVATION), y)
        return "layer_norm", record, [FLOAT_TYPES["float16"]]

    def linear(
        self, rows: int, inputs: int, outputs: int, x: int, y: int, *, gelu: bool = False, residual: int | None = None
    ) -> tuple[str, ctypes.Structure, Sequence[int]]:
        """A LinearQuantize, or with a residual a Linear, of its own weight."""
        weight = self.put(self.random((outputs * inputs,)))
        scale = self.put(np.full(outputs, 1 / (74 * 74 * inputs**0.5), np.float32))
        offset = self.put(np.zeros(outputs, np.int32))
        quantizer = None if residual is not None else ctypes.pointer(c_quantizer(ACTIVATION))
        record = Linear(
            rows, inputs, outputs, x, weight, offset, scale, self.no_bias, int(gelu), None, residual, 0, None,
            quantizer, y,
        )  # fmt: skip
        return "linear", record, [FLOAT_TYPES["float16"], TILES["auto"]]

    def attention(
        self, batch: int, tokens: int, shape: VitShape, operands: Sequence[int], y: int
    ) -> tuple[str, ctypes.Structure, Sequence[int]]:
        """An AttentionQuantize."""
        width, none = shape.width // shape.heads, Addend(None, 0, 0, 0)
        record = Attention(
            batch, shape.heads, tokens, tokens, width, width, *operands, 128, 128, 128, 1e-4, 1e-4, none, none, 0,
            c_quantizer(PROBABILITY), ctypes.pointer(c_quantizer(ACTIVATION)), y,
        )  # fmt: skip
        return "attention", record, []


def measure_chains(shape: VitShape, batches: Sequence[int], *, rehearse: bool = False) -> Iterator[dict[str, Any]]:
    """Milliseconds of all blocks of a batch, and microseconds of each kernel when it runs over and over.

    Raises:
        ProviderError: there is no CUDA runtime.
        RuntimeError: the kernels were not built, there is no GPU, or a kernel failed.
    """
    library, runtime = open_kernels()
    for batch in batches:
        chain = Chain(library, runtime, shape, batch)
        repeats, replays, rounds = (1, 1, 1) if rehearse else (REPEATS, REPLAYS, ROUNDS)
        whole = graph_ms(chain, [run for _, run in chain.kernels], replays, rounds)
        row: dict[str, Any] = {"batch": batch, "blocks, ms": round(whole, 3)}
        for name, run in dict(chain.kernels[:9]).items():
            row[f"{name}, us"] = round(1000 * graph_ms(chain, [run] * repeats, replays, rounds) / repeats, 1)
        yield row


def graph_ms(chain: Chain, kernels: Sequence[Kernel], replays: int, rounds: int) -> float:
    """Milliseconds of these kernels one after another, replayed from a graph."""
    runtime, check = chain.memory.runtime, chain.memory.check
    stream, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    check(runtime.cudaStreamCreate(ctypes.byref(stream)))
    for captures in (
        False,
        True,
    ):  # once as they are: what is asked of a device at first is not to be asked in a capture
        if captures:
            check(runtime.cudaStreamBeginCapture(stream, CAPTURE_OF_THIS_THREAD))
        for run in kernels:
            if run(stream):
                raise RuntimeError(f"a kernel failed: {chain.library.mptqc_cuda_failure().decode()}")
    check(runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)))
    check(runtime.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)))
    events = [ctypes.c_void_p(), ctypes.c_void_p()]
    for event in events:
        check(runtime.cudaEventCreate(ctypes.byref(event)))
    check(runtime.cudaGraphLaunch(executable, stream))
    times = []
    for _ in range(rounds):
        check(runtime.cudaEventRecord(events[0], stream))
        for _ in range(replays):
            check(runtime.cudaGraphLaunch(executable, stream))
        check(runtime.cudaEventRecord(events[1], stream))
        check(runtime.cudaEventSynchronize(events[1]))
        elapsed = ctypes.c_float()
        check(runtime.cudaEventElapsedTime(ctypes.byref(elapsed), *events))
        times.append(elapsed.value / replays)
    return statistics.median(times)
