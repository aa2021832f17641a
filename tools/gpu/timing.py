"""Times of whole models: sessions of ONNX Runtime with inputs and outputs on the device, and torch."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mptqc.runtime.session import Session

WARM_UP_RUNS = 3
LEAST_RUNS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run of a batch."""

    median_ms: float
    least_ms: float
    most_ms: float
    runs: int


def time_runs(run: Callable[[], None], seconds: float) -> Timing:
    """Time `run`, which returns when its work is done, for about `seconds`."""
    for _ in range(WARM_UP_RUNS):
        run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return Timing(statistics.median(times), min(times), max(times), len(times))


def session_run(session: Session, batch: NDArray[np.generic]) -> Callable[[], None]:
    """One run of a session: the batch is on the session's device already, and the outputs stay there, in one place."""
    import onnxruntime

    device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"
    binding = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(batch, device, 0)
    binding.bind_ortvalue_input(session.get_inputs()[0].name, value)
    names = [output.name for output in session.get_outputs()]
    for name in names:
        binding.bind_output(name, device, 0)
    session.run_with_iobinding(binding)
    for name, output in zip(names, binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(name, output)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def torch_model(name: str) -> Callable[[NDArray[np.float32]], Callable[[], None]]:
    """timm's model with random weights in torch float16, compiled, scaled-dot-product attention.

    Raises:
        RuntimeError: torch sees no GPU.
    """
    import timm
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    model = torch.compile(timm.create_model(name, pretrained=False).eval().to("cuda", torch.float16))

    def bind(batch: NDArray[np.float32]) -> Callable[[], None]:
        images = torch.from_numpy(batch).to("cuda", torch.float16)

        def run() -> None:
            with torch.inference_mode():
                model(images)
            torch.cuda.synchronize()

        return run

    return bind
