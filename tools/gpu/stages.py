"""The stages of the check. Each stands by itself: it returns what it found, and raises to say what it lacks."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu.models import FORMS, SUBJECTS, Subject, images_of, make_form
from gpu.timing import session_run, time_runs, torch_model
from mptqc.runtime.evaluate import sqnr_db
from mptqc.runtime.session import create_session

ROOT = Path(__file__).parents[2]
SANITIZED_TESTS = "on_gpu and (residual or any_address or moves_rows or patches)"
"""A few tests of every kernel: under compute-sanitizer each takes seconds."""
TORCH_FORM = "torch float16"
GRAPHED = ", CUDA graph"
"""Ends the name of a form that is run from a CUDA graph."""
TIMED_FORMS = (*FORMS, f"float16{GRAPHED}", f"mptqc{GRAPHED}", TORCH_FORM)
"""torch last: it compiles for a minute."""
COMPARED_FORMS, COMPARED_IMAGES = ("mptqc float32", "mptqc"), 4
MOST_LOSS_DB = 1.0
"""How much farther from the float model than the portable file on the CPU a form may be on the device. The two are as
far from each other as from it: a code next to a rounding boundary changes, and moves what follows by steps."""
REHEARSED_TESTS = "on_gpu and (residual or moves_rows or patches or graph)"
REHEARSED_PRODUCTS = MappingProxyType({"small": (128, 64, 128)})


class Missing(Exception):  # noqa: N818 - it ends a stage, and need not be a fault
    """What a stage needs and this machine lacks, with what to do."""


@dataclass(frozen=True)
class Settings:
    """What to check, and how long.

    Attributes:
        folder: where models are kept.
        models: names of SUBJECTS.
        batches: batch sizes of the benchmark.
        forms: of TIMED_FORMS, what the benchmark times.
        seconds: for each figure of the benchmark.
        deadline: `time.monotonic()` after which nothing new is begun.
        rehearse: there is no GPU but a fake one, so that everything is to be small.
    """

    folder: Path
    models: tuple[str, ...]
    batches: tuple[int, ...]
    forms: tuple[str, ...]
    seconds: float
    deadline: float
    rehearse: bool = False

    def late(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self.deadline


def build(settings: Settings, report: Callable[[Any], None]) -> None:
    """Build the kernel libraries for this GPU."""
    if not settings.rehearse and shutil.which("nvcc") is None:
        raise Missing("there is no nvcc: install CUDA 13 and put its bin folder on PATH")
    environment = {**os.environ, "MPTQC_CUDA": str(int(not settings.rehearse))}
    environment["MPTQC_CUDA_ARCHITECTURES"] = architectures = architecture()
    started = time.monotonic()
    run_command([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], settings, environment)
    built = "none: the emulated device's library" if settings.rehearse else architectures
    report({"seconds": round(time.monotonic() - started, 1), "architectures": built})


def kernels(settings: Settings, report: Callable[[Any], None]) -> None:
    """Run the kernels' tests, plainly and under compute-sanitizer."""
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_cuda.py", "-k"]
    which = REHEARSED_TESTS if settings.rehearse else "on_gpu"
    summary = run_command([sys.executable, *tests, which], settings).strip().splitlines()[-1]
    if " passed" not in summary:
        raise Missing(f"no kernel test ran: {summary}; is there a GPU, and did the stage `build` pass?")
    report({"tool": "pytest", "result": summary})
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise Missing("there is no compute-sanitizer (it comes with CUDA): memory and races were not checked")
    for tool in ("memcheck", "racecheck"):
        if settings.late():
            raise Missing(f"no time was left for compute-sanitizer {tool}")
        command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", sys.executable, *tests, SANITIZED_TESTS]
        report({"tool": tool, "result": run_command(command, settings).strip().splitlines()[-1]})


def products(settings: Settings, report: Callable[[Any], None]) -> None:
    """Measure the int8 Linear by itself, against the fastest int8 product of this machine."""
    from gpu.products import SHAPES, measure_products

    best = 0.0
    for row in measure_products(REHEARSED_PRODUCTS if settings.rehearse else SHAPES):
        report(row)
        best = max(best, row["cuBLASLt s8"] or 0.0)
    if not best:
        raise Missing(
            "there is nothing to compare with: torch, which brings cuBLASLt's product, is not there or sees no GPU"
        )


def chain(settings: Settings, report: Callable[[Any], None]) -> None:
    """Time the kernels of ViT-B's blocks one after another, without ONNX Runtime."""
    from gpu.chain import measure_chains

    shape = SUBJECTS["tiny" if settings.rehearse else "vit-b"].shape
    assert shape is not None, "these are plain ViTs"
    for row in measure_chains(shape, settings.batches, rehearse=settings.rehearse):
        report(row)


def e2e(settings: Settings, report: Callable[[Any], None]) -> None:
    """Compare compiled models with their portable file on the CPU, and float16 with float32 beside them."""
    for name in settings.models:
        if settings.late():
            raise Missing(f"no time was left for {name} and what follows it")
        subject = SUBJECTS[name]
        images = images_of(subject, COMPARED_IMAGES)
        whole = outputs_of(make_form(subject, "float32", settings.folder), "cpu", images)
        portable = outputs_of(make_form(subject, "portable", settings.folder), "cpu", images)
        row: dict[str, Any] = {"model": name, "portable on the CPU, dB to float32": agreement(portable, whole)}
        for form in COMPARED_FORMS:
            found = outputs_of(make_form(subject, form, settings.folder), "cuda", images)
            row[f"{form}, dB to float32"] = agreement(found, whole)
            row[f"{form}, dB to the CPU"] = agreement(found, portable)
        try:
            half = outputs_of(make_form(subject, "float16", settings.folder), "cuda", images)
            row["float16, dB to float32"] = agreement(half, whole)
        except Exception as error:  # it is there to compare with only
            row["float16, dB to float32"] = first_line(error)
        report(row)
        expected = row["portable on the CPU, dB to float32"]
        for form in COMPARED_FORMS:
            decibels = row[f"{form}, dB to float32"]
            if not decibels >= expected - MOST_LOSS_DB:
                raise RuntimeError(f"{name}: {form} is {decibels} dB from the float model; on the CPU {expected} dB")


def outputs_of(path: Path, provider: str, images: NDArray[np.float32]) -> NDArray[np.float64]:
    """The first output of a model."""
    session = create_session(path, provider=provider)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0]).astype(np.float64)


def agreement(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Signal over difference, dB; not a number if an output is none, or none is expected."""
    if not np.isfinite(found).all():
        return float("nan")
    decibels = sqnr_db(float(np.square(expected).sum()), float(np.square(found - expected).sum()))
    return float("nan") if decibels is None else round(decibels, 1)


def bench(settings: Settings, report: Callable[[Any], None]) -> None:
    """Time every form of every model, batch by batch; what fails or has no time left says so in its row."""
    for form in settings.forms:
        for name in settings.models:
            rows = [{"model": name, "form": form, "batch": batch} for batch in settings.batches]
            try:
                bind = None if settings.late() else opened(SUBJECTS[name], form, settings)
            except Exception as error:  # one form that does not load must not end the others
                for row in rows:
                    report({**row, "failed": first_line(error)})
                continue
            for row in rows:
                report({**row, **measured(bind, SUBJECTS[name], row["batch"], settings)})


def opened(subject: Subject, form: str, settings: Settings) -> Callable[[np.ndarray], Callable[[], None]]:
    """A form of a model, ready to be given a batch; then each call is one run."""
    if form == TORCH_FORM:
        if subject.timm_name is None:
            raise Missing("timm has no such model")
        return torch_model(subject.timm_name)
    path = make_form(subject, form.removesuffix(GRAPHED), settings.folder)
    if form.endswith(GRAPHED):  # a session keeps one graph, of one batch
        return lambda images: session_run(create_session(path, provider="cuda", cuda_graph=True), images)
    session = create_session(path, provider="cuda")
    return lambda images: session_run(session, images)


def measured(
    bind: Callable[[np.ndarray], Callable[[], None]] | None, subject: Subject, batch: int, settings: Settings
) -> dict[str, Any]:
    """Figures of one batch, or why there are none."""
    if bind is None or settings.late():
        return {"left out": "no time was left"}
    try:
        timing = time_runs(bind(images_of(subject, batch)), settings.seconds)
    except Exception as error:  # a batch that does not fit must not end the others
        return {"failed": first_line(error)}
    return {**asdict(timing), "images_per_second": round(1000 * batch / timing.median_ms, 1)}


def architecture() -> str:
    """Of the first GPU as nvcc names it; every one that setup.py knows where there is no GPU."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "80,86,89,90,100,120"
    return found.splitlines()[0].strip().replace(".", "")


def run_command(command: list[str], settings: Settings, environment: dict[str, str] | None = None) -> str:
    """Run a program in the repository until the deadline; its output.

    Raises:
        RuntimeError: it failed, with the end of what it printed.
        Missing: the time was used up.
    """
    left = settings.deadline - time.monotonic()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    variables = {**(environment or os.environ), "PYTHONPATH": path}
    try:
        ran = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=max(left, 1)
        )
    except subprocess.TimeoutExpired as error:
        raise Missing(f"no time was left for {' '.join(command[:4])} …") from error
    if ran.returncode:
        raise RuntimeError(
            f"{' '.join(command[:4])} … ended with {ran.returncode}: {(ran.stdout + ran.stderr)[-2000:]}"
        )
    return ran.stdout


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a table."""
    text = re.sub(r"\s+", " ", str(error))
    return f"{type(error).__name__}: {text[:200]}"


STAGES: dict[str, Callable[[Settings, Callable[[Any], None]], None]] = {
    "build": build,
    "kernels": kernels,
    "products": products,
    "chain": chain,
    "e2e": e2e,
    "bench": bench,
}
