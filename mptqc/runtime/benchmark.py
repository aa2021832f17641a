"""Times of several models, measured side by side.

Machines change their speed from one second to the next, so the models take turns, A B C A B C ..., and a speed-up is
the median over rounds of (time of the first model / time of this model) within one round. A turn is two runs, of which
the second counts: it finds caches and clock as they are in a service that runs one model, not as another model left
them. With one thread on the CPU the clock is that thread's CPU time, which other processes do not disturb; otherwise it
is wall time, which on CUDA includes copying the input and output.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mptqc.data.samples import shape_text
from mptqc.errors import RecipeError
from mptqc.runtime.fused_ops import matmul_counts, open_counted_session
from mptqc.runtime.model_files import model_file_bytes
from mptqc.runtime.model_io import ModelInput, model_inputs
from mptqc.runtime.session import Session

MIN_ROUNDS = 10
WARM_UP_RUNS = 3

Clock = Literal["cpu", "wall"]
TimedRun = Callable[[], int]
"""Runs a model once and returns the nanoseconds that it took."""
Feeds = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class BenchmarkRow:
    """One model's figures. Times are of one run of `batch` images, in milliseconds.

    `speedup` is against the first model. `integer_matmuls`, `float_matmuls` and `fused_ops` (count by operator type)
    are of the graph that ran, after ONNX Runtime's optimisation. `file_bytes` includes external data. `clock` is
    "cpu" (this thread's CPU time) or "wall".
    """

    model: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    speedup: float
    file_bytes: int
    integer_matmuls: int
    float_matmuls: int
    fused_ops: Mapping[str, int]
    batch: int
    threads: int
    provider: str
    rounds: int
    clock: Clock


def benchmark(
    models: Sequence[str | Path],
    *,
    batch: int = 1,
    threads: int = 1,
    provider: str = "cpu",
    min_seconds: float = 2.0,
    repeats: int | None = None,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[BenchmarkRow]:
    """Time the models on the same seeded standard normal input, taking turns.

    Args:
        models: ONNX files; the first is what speed-ups are against.
        batch: images a run.
        threads: per session, 0 for every core.
        provider: "cpu" or "cuda".
        min_seconds: go on for so long for each model, and for at least MIN_ROUNDS rounds.
        repeats: exactly so many rounds instead.
        shape: input dimensions after the batch, for models where one of them is dynamic.
        seed: of the input.
        progress: called after each round.

    Returns:
        One row a model, in the given order.

    Raises:
        ModelError: a file is not a model, or its input is not float32.
        ProviderError: the provider cannot start here.
        RecipeError: an option is out of range or does not fit a model.
    """
    _check_options(models, batch, min_seconds, repeats)
    sizes = [model_file_bytes(path) for path in models]
    opened = [open_counted_session(path, provider=provider, threads=threads) for path in models]
    feeds = [
        _feeds(path, model_inputs(session), batch, shape, seed)
        for path, (session, _) in zip(models, opened, strict=True)
    ]
    clock: Clock = "cpu" if provider == "cpu" and threads == 1 else "wall"
    runs = [timed_run(session, feed, clock) for (session, _), feed in zip(opened, feeds, strict=True)]
    milliseconds = interleaved(runs, min_seconds, repeats, progress)
    return [
        BenchmarkRow(
            model=str(path),
            median_ms=float(np.median(times)),
            p10_ms=float(np.percentile(times, 10)),
            p90_ms=float(np.percentile(times, 90)),
            speedup=float(np.median(milliseconds[:, 0] / times)),
            file_bytes=size,
            integer_matmuls=matmul_counts(counts).integer_matmuls,
            float_matmuls=matmul_counts(counts).float_matmuls,
            fused_ops=counts,
            batch=batch,
            threads=threads,
            provider=provider,
            rounds=len(times),
            clock=clock,
        )
        for path, size, (_, counts), times in zip(models, sizes, opened, milliseconds.T, strict=True)
    ]


def _check_options(models: Sequence[str | Path], batch: int, min_seconds: float, repeats: int | None) -> None:
    if not models:
        raise RecipeError("there is no model to benchmark; give at least one ONNX file.")
    if batch < 1:
        raise RecipeError(f"batch is {batch}; give a positive number.")
    if not 0 <= min_seconds < float("inf"):
        raise RecipeError(f"min_seconds is {min_seconds}; give a number of seconds, 0 or more.")
    if repeats is not None and repeats < 1:
        raise RecipeError(f"repeats is {repeats}; give a positive number.")


def _feeds(path: str | Path, inputs: Sequence[ModelInput], batch: int, shape: Sequence[int] | None, seed: int) -> Feeds:
    generator = np.random.default_rng(seed)
    return {
        value.name: generator.standard_normal(_full_shape(path, value, batch, shape), dtype=np.float32)
        for value in inputs
    }


def _full_shape(path: str | Path, value: ModelInput, batch: int, shape: Sequence[int] | None) -> tuple[int, ...]:
    named = f"{path}: input {value.name!r} {shape_text(value.shape)}"
    if value.fixed_batch not in (None, batch):
        raise RecipeError(
            f"{named} has a fixed batch of {value.fixed_batch}, not {batch}; use --batch {value.fixed_batch}, or "
            "export the model with a dynamic batch."
        )
    own = value.shape[1:]
    if shape is None:
        if None in own:
            raise RecipeError(f"{named} has dynamic dimensions beside the batch; give them, as in --shape 3,224,224.")
        return (batch, *(size for size in own if size is not None))
    if len(shape) != len(own) or any(size not in (None, given) for size, given in zip(own, shape, strict=True)):
        raise RecipeError(f"{named} does not fit --shape {','.join(map(str, shape))} (dimensions after the batch).")
    if min(shape, default=1) < 1:
        raise RecipeError(f"--shape {','.join(map(str, shape))} has a dimension below 1.")
    return (batch, *shape)


def timed_run(session: Session, feed: Feeds, clock: Clock) -> TimedRun:
    """Return what runs the session on `feed` and takes the time, this thread's CPU time or wall time."""
    now = time.thread_time_ns if clock == "cpu" else time.perf_counter_ns

    def run() -> int:
        start = now()
        session.run(None, feed)
        return now() - start

    return run


def interleaved(
    runs: Sequence[TimedRun],
    min_seconds: float,
    repeats: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """Let the runs take turns, as `benchmark` describes; return milliseconds [rounds, runs]."""
    warm_up_started = time.perf_counter()
    for run in runs:
        for _ in range(WARM_UP_RUNS):
            run()
    round_seconds = (time.perf_counter() - warm_up_started) / WARM_UP_RUNS
    rounds = repeats or max(MIN_ROUNDS, round(min_seconds * len(runs) / max(2 * round_seconds, 1e-6)))
    nanoseconds = np.zeros((rounds, len(runs)), np.int64)
    for k in range(rounds):
        for column, run in enumerate(runs):
            run()
            nanoseconds[k, column] = run()
        if progress is not None:
            progress("benchmark", k + 1, rounds)
    return nanoseconds / 1e6
