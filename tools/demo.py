"""Compile vision transformers at several widths; compare them with the float model and with ONNX Runtime's own int8.

    python tools/demo.py [--output mptqc-demo] [--no-speed]

Two tables. First a small trained model, for accuracy. Then a ViT-S/16 with random weights, for speed and size: how
fast a model runs depends on its shape, and the small one is too small to gain much. Leaves the compiled models, their
plans and results.json in the output folder.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import onnxruntime
from peers import write_dynamic_int8, write_static_int8
from random_vit import CALIBRATION_IMAGES, VitShape, write_random_images, write_random_vit
from rich import box
from rich.console import Console
from rich.table import Table

import mptqc
from mptqc.api import lower
from mptqc.cli.progress import progress
from mptqc.data.load import load_samples
from mptqc.data.preprocess_sources import load_preprocessing
from mptqc.data.samples import Samples
from mptqc.errors import MptqcError
from mptqc.recipe import EFFORTS, Effort
from mptqc.runtime.benchmark import BenchmarkRow, benchmark
from mptqc.runtime.evaluate import Evaluation, evaluate
from mptqc.runtime.library import chosen_isa, find_library, load_library
from mptqc.runtime.machine import cpu_info, processor_name
from mptqc.runtime.model_io import image_input
from mptqc.runtime.session import create_session

ZOO = Path(__file__).parents[1] / "zoo"
EVALUATION_BATCH = 50
MEGABYTE = 1e6

PRESETS = ("w8a8", "w4a8", "w3a8", "w2a8", "w4a4", "w3a3")
VIEWS = EFFORTS[Effort.BALANCED]["views"]
Options = Mapping[str, object]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """What to compile: recipes by the name that the table gives them, each a preset and options."""

    model: Path
    calibration: Path
    preprocess: Path | None
    recipes: Mapping[str, tuple[str, Options]]


@dataclass(frozen=True)
class Candidate:
    """A model file, what the table calls it, and its figures; `evaluation` is None where no images are labelled."""

    name: str
    path: Path
    speed: BenchmarkRow
    evaluation: Evaluation | None


def main() -> None:
    """Compile, measure and print."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    results: dict[str, object] = {
        "onnxruntime": onnxruntime.__version__,
        "processor": processor_name(cpu_info()),
        "calibration_images": arguments.samples,
    }
    options = {"samples": arguments.samples}
    recipes = {f"mptqc {preset.upper()}": (preset, options) for preset in PRESETS}
    zoo = Job(arguments.model, arguments.calibration, arguments.preprocess, recipes)
    trained = measure(zoo, arguments, arguments.data)
    console.print(as_table(f"{arguments.model.stem} of the zoo: accuracy, size, speed", trained))
    console.print(accuracy_conditions(arguments, trained), speed_conditions(trained), soft_wrap=True)
    results["accuracy"] = as_rows(trained)
    if arguments.speed:
        sized = measure(speed_job(arguments.output), arguments, None)
        console.print(as_table("ViT-S/16 at 224, random weights: size, speed", sized))
        console.print(speed_conditions(sized), soft_wrap=True)
        results["speed"] = as_rows(sized)
    console.print(kernel_conditions(), soft_wrap=True)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"Models, plans and results.json are in {arguments.output}/", soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; without arguments, the zoo's ViT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ZOO / "vit.onnx")
    parser.add_argument("--calibration", type=Path, default=ZOO / "calibration.npz")
    parser.add_argument("--data", type=Path, default=ZOO / "test.npz", help="labelled images to test with")
    parser.add_argument("--preprocess", type=Path, default=ZOO / "preprocess.json")
    parser.add_argument("--samples", type=int, default=64, help="calibration images")
    parser.add_argument("--batch", type=int, default=1, help="images a run in the benchmark")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="leave out the second table")
    parser.add_argument("--output", type=Path, default=Path("mptqc-demo"))
    return parser.parse_args()


def speed_job(folder: Path) -> Job:
    """A ViT-S with random weights. Nothing is searched: the operators that run do not depend on it."""
    model, images = folder / "vit_s_random.onnx", folder / "noise.npz"
    write_random_vit(model, VitShape())
    write_random_images(images, VitShape())
    quick: Options = MappingProxyType(
        {
            "samples": CALIBRATION_IMAGES,
            "range_method": "min-max",
            "smoothing": False,
            "attention_folds": False,
            "compensation": False,
        }
    )
    recipes = {
        "mptqc W8A8": ("w8a8", quick),
        "mptqc W8A8 cpu": ("w8a8", {**quick, "target": "cpu"}),
        "mptqc W4A8": ("w4a8", {**quick, "trellis": False}),  # it changes the session's start, no more
        "mptqc W4A4": ("w4a4", quick),
    }
    return Job(model, images, None, recipes)


def measure(job: Job, arguments: argparse.Namespace, data: Path | None) -> list[Candidate]:
    """Compile, evaluate on `data` if given, and time everything side by side; the float model comes first."""
    with progress("demo") as report:
        files = {"float32": job.model, **write_peers(job, arguments, report), **write_ours(job, arguments, report)}
        files |= write_native(files["mptqc W8A8"])
        evaluations: list[Evaluation | None] = [None] * len(files)
        if data is not None:
            test = open_samples(data, job)
            evaluations = [
                evaluate(path, test, reference=job.model, threads=0, batch=EVALUATION_BATCH, progress=report)
                for path in files.values()
            ]
        rows = benchmark(list(files.values()), batch=arguments.batch, threads=arguments.threads, progress=report)
    return [
        Candidate(name, path, row, evaluation)
        for (name, path), row, evaluation in zip(files.items(), rows, evaluations, strict=True)
    ]


def open_samples(path: Path, job: Job) -> Samples:
    """Open the images at `path` for the job's model."""
    value = image_input(create_session(job.model, threads=1))
    preprocessing = None if job.preprocess is None else load_preprocessing(job.preprocess)
    return load_samples(path, input_name=value.name, input_shape=value.shape, preprocessing=preprocessing)


def write_ours(job: Job, arguments: argparse.Namespace, report: Report) -> dict[str, Path]:
    """Compile every recipe; the files by name."""
    files = {}
    for name, (preset, options) in job.recipes.items():
        target = ".cpu" if "target" in options else ""
        path = arguments.output / f"{job.model.stem}.{preset}{target}.onnx"
        result = mptqc.compile(
            job.model,
            job.calibration,
            preset=preset,
            preprocess=None if job.preprocess is None else str(job.preprocess),
            options=dict(options),
            report=named(name, report),
        )
        result.save(path, path.with_suffix(".plan.json"))
        files[name] = path
    return files


def write_native(portable: Path) -> dict[str, Path]:
    """Lower W8A8 to the kernel library, where there is one."""
    if find_library() is None:
        return {}
    path = portable.with_suffix(".cpu-native.onnx")
    lower(portable).save(path)
    return {"W8A8 native": path}


def named(name: str, report: Report) -> Report:
    """Report steps under the name of what they are for."""
    return lambda step, done, total: report(f"{name}: {step}", done, total)


def write_peers(job: Job, arguments: argparse.Namespace, report: Report) -> dict[str, Path]:
    """ONNX Runtime's own two, from the same images as ours: both draw them with the same seed."""
    static, dynamic = (arguments.output / f"{job.model.stem}.ort-{kind}.onnx" for kind in ("static", "dynamic"))
    calibration = open_samples(job.calibration, job)
    input_name = image_input(create_session(job.model, threads=1)).name
    report("onnxruntime.quantization", 0, 2)
    write_static_int8(job.model, static, calibration.take(arguments.samples, seed=0), input_name)
    report("onnxruntime.quantization", 1, 2)
    write_dynamic_int8(job.model, dynamic)
    return {"ORT static": static, "ORT dynamic": dynamic}


def as_table(title: str, candidates: Sequence[Candidate]) -> Table:
    """One line a model; columns for accuracy only where it was measured."""
    first = candidates[0]
    columns: dict[str, Callable[[Candidate], str]] = {}
    if first.evaluation is not None:
        columns["top-1"] = lambda one: percent(one.evaluation.top1 if one.evaluation else None)
        columns["agreement"] = lambda one: "" if one is first else percent(agreement(one))
        columns["SQNR dB"] = lambda one: "" if one is first else decibels(one)
    columns["file MB"] = lambda one: f"{one.speed.file_bytes / MEGABYTE:.2f}"
    columns["× smaller"] = lambda one: f"{first.speed.file_bytes / one.speed.file_bytes:.1f}"
    columns["median ms"] = lambda one: f"{one.speed.median_ms:.2f}"
    columns["× float"] = lambda one: f"{one.speed.speedup:.2f}"
    table = Table("model", title=title, box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="right")
    for candidate in candidates:
        table.add_row(candidate.name, *(text(candidate) for text in columns.values()))
    return table


def agreement(candidate: Candidate) -> float | None:
    """Share of images on which the float model answers the same."""
    return candidate.evaluation.agreement if candidate.evaluation else None


def decibels(candidate: Candidate) -> str:
    """SQNR against the float model, a dash if there is none."""
    rate = candidate.evaluation.sqnr_db if candidate.evaluation else None
    return "–" if rate is None else f"{rate:.1f}"


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal, a dash if there is none."""
    return "–" if share is None else f"{100 * share:.1f}%"


def accuracy_conditions(arguments: argparse.Namespace, candidates: Sequence[Candidate]) -> str:
    """What the accuracy holds for."""
    evaluation = candidates[0].evaluation
    images = 0 if evaluation is None else evaluation.images
    return (
        f"{images} test images, {arguments.samples} for calibration; agreement and SQNR are against float32. "
        f"ORT: int8 by onnxruntime.quantization, from the same images; mptqc makes {VIEWS} views of each."
    )


def speed_conditions(candidates: Sequence[Candidate]) -> str:
    """What the times hold for."""
    row = candidates[0].speed
    clock = "CPU time of the thread" if row.clock == "cpu" else "wall time"
    return (
        f"Times: batch {row.batch}, {row.threads} thread, median of {row.rounds} interleaved rounds, {clock}; "
        f"onnxruntime {onnxruntime.__version__}, {processor_name(cpu_info())}."
    )


def kernel_conditions() -> str:
    """What runs a native model, or why there is none."""
    library = find_library()
    if library is None:
        return "Native models are left out: the kernel library was not built, for lack of a C++17 compiler."
    return f"Native: --target cpu-native, with mptqc's kernel library ({chosen_isa(load_library(library))})."


def as_rows(candidates: Sequence[Candidate]) -> list[dict[str, object]]:
    """The table as JSON: each row joins evaluate's and benchmark's keys."""
    return [
        {
            "name": candidate.name,
            **({} if candidate.evaluation is None else asdict(candidate.evaluation)),
            **asdict(candidate.speed),
        }
        for candidate in candidates
    ]


if __name__ == "__main__":
    try:
        main()
    except MptqcError as error:
        sys.exit(f"error: {error}")
