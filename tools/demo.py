"""Compile a small vision transformer at four widths and compare it with the float model and ONNX Runtime's own int8.

    python tools/demo.py [--output mptqc-demo]

Prints one table; leaves the compiled models, their plans and results.json in the output folder.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime
from peers import write_dynamic_int8, write_static_int8
from rich import box
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mptqc.compiler import compile_model
from mptqc.data.load import load_samples
from mptqc.data.preprocess import Preprocessing
from mptqc.data.preprocess_sources import load_preprocessing
from mptqc.data.samples import Samples
from mptqc.graph.io import save_model
from mptqc.plan import save_plan
from mptqc.recipe import make_recipe
from mptqc.runtime.benchmark import BenchmarkRow, benchmark
from mptqc.runtime.evaluate import Evaluation, evaluate
from mptqc.runtime.machine import cpu_info, processor_name
from mptqc.runtime.model_io import image_input
from mptqc.runtime.session import create_session

ZOO = Path(__file__).parents[1] / "zoo"
PRESETS = ("w8a8", "w6a6", "w4a4", "w3a3")
EVALUATION_BATCH = 50
MEGABYTE = 1e6


@dataclass(frozen=True)
class Candidate:
    """A model file and what the table calls it."""

    name: str
    path: Path


def main() -> None:
    """Compile, evaluate, benchmark, and print the table."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    preprocessing = load_preprocessing(arguments.preprocess)
    calibration = open_samples(arguments.calibration, arguments.model, preprocessing)
    test = open_samples(arguments.data, arguments.model, preprocessing)
    console = Console()
    with Progress(TextColumn("{task.description}"), *Progress.get_default_columns()[1:2], TimeRemainingColumn()) as bar:
        report = Reporter(bar)
        candidates = make_candidates(arguments, calibration, preprocessing, report)
        evaluations = []
        for candidate in candidates:
            report.prefix = f"{candidate.name}: "
            evaluations.append(
                evaluate(
                    candidate.path,
                    test,
                    reference=arguments.model,
                    threads=arguments.threads,
                    batch=EVALUATION_BATCH,
                    progress=report,
                )
            )
        report.prefix = ""
        rows = benchmark(
            [candidate.path for candidate in candidates],
            batch=arguments.batch,
            threads=arguments.threads,
            progress=report,
        )
    console.print(as_table(candidates, evaluations, rows))
    console.print(conditions(arguments, test.count, rows[0]), soft_wrap=True)
    results = as_results(arguments, candidates, evaluations, rows)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"Models, plans and results.json are in {arguments.output}/", soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; without arguments, the zoo's ViT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ZOO / "vit.onnx")
    parser.add_argument("--calibration", type=Path, default=ZOO / "calibration.npz")
    parser.add_argument("--data", type=Path, default=ZOO / "test.npz")
    parser.add_argument("--preprocess", default=ZOO / "preprocess.json")
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--samples", type=int, default=64, help="calibration images")
    parser.add_argument("--batch", type=int, default=1, help="images a run in the benchmark")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("mptqc-demo"))
    return parser.parse_args()


class Reporter:
    """Shows (step, done, total) as one bar that is reused from step to step."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("start", total=None)
        self._step = ""
        self.prefix = ""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Take a report of progress."""
        description = self.prefix + step
        if description != self._step:
            self._bar.reset(self._task, description=description)
            self._step = description
        self._bar.update(self._task, completed=done, total=total)


def open_samples(path: Path, model: Path, preprocessing: Preprocessing) -> Samples:
    """Open the images at `path` for the model's input."""
    value = image_input(create_session(model, threads=1))
    return load_samples(path, input_name=value.name, input_shape=value.shape, preprocessing=preprocessing)


def make_candidates(
    arguments: argparse.Namespace, calibration: Samples, preprocessing: Preprocessing, report: Reporter
) -> list[Candidate]:
    """The float model, ONNX Runtime's two, and ours, compiled from the same images."""
    model: Path = arguments.model
    compiled = []
    for preset in arguments.presets:
        report.prefix = f"compile {preset.upper()}: "
        recipe = make_recipe(preset, options={"samples": arguments.samples})
        result = compile_model(model, calibration, recipe, preprocess=preprocessing.to_json(), report=report)
        path = arguments.output / f"{model.stem}.{preset}.onnx"
        save_model(result.model, path)
        save_plan(result.plan, path.with_suffix(".plan.json"))
        compiled.append(Candidate(f"mptqc {preset.upper()}", path))
    static, dynamic = (arguments.output / f"{model.stem}.ort-{kind}.onnx" for kind in ("static", "dynamic"))
    report.prefix = ""
    report("onnxruntime.quantization", 0, 2)
    input_name = image_input(create_session(model, threads=1)).name
    # The same images as ours: compile_model draws them from the same seed.
    write_static_int8(model, static, calibration.take(arguments.samples, seed=0), input_name)
    report("onnxruntime.quantization", 1, 2)
    write_dynamic_int8(model, dynamic)
    return [
        Candidate("float32", model),
        Candidate("ORT static", static),
        Candidate("ORT dynamic", dynamic),
        *compiled,
    ]


def as_table(candidates: Sequence[Candidate], evaluations: Sequence[Evaluation], rows: Sequence[BenchmarkRow]) -> Table:
    """One line a model."""
    title = f"{candidates[0].path.name}: float against integers"
    table = Table(title=title, box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column("model")
    for heading in ("top-1", "agreement", "SQNR dB", "file MB", "× smaller", "median ms", "× float"):
        table.add_column(heading, justify="right")
    for candidate, evaluation, row in zip(candidates, evaluations, rows, strict=True):
        is_reference = candidate is candidates[0]
        table.add_row(
            candidate.name,
            percent(evaluation.top1),
            "" if is_reference else percent(evaluation.agreement),
            "" if is_reference or evaluation.sqnr_db is None else f"{evaluation.sqnr_db:.1f}",
            f"{row.file_bytes / MEGABYTE:.2f}",
            f"{rows[0].file_bytes / row.file_bytes:.1f}",
            f"{row.median_ms:.3f}",
            f"{row.speedup:.2f}",
        )
    return table


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal, a dash if there is none."""
    return "–" if share is None else f"{100 * share:.1f}%"


def conditions(arguments: argparse.Namespace, images: int, row: BenchmarkRow) -> str:
    """What the figures hold for."""
    clock = "CPU time of the thread" if row.clock == "cpu" else "wall time"
    return (
        f"{images} test images, {arguments.samples} for calibration. Times: batch {row.batch}, {row.threads} thread, "
        f"median of {row.rounds} interleaved rounds, {clock}; onnxruntime {onnxruntime.__version__}, "
        f"{processor_name(cpu_info())}. Agreement and SQNR are against the float model. "
        "ORT static, ORT dynamic: int8 by onnxruntime.quantization, from the same images."
    )


def as_results(
    arguments: argparse.Namespace,
    candidates: Sequence[Candidate],
    evaluations: Sequence[Evaluation],
    rows: Sequence[BenchmarkRow],
) -> dict[str, object]:
    """The table and its conditions as JSON: each row joins evaluate's and benchmark's keys."""
    return {
        "onnxruntime": onnxruntime.__version__,
        "processor": processor_name(cpu_info()),
        "calibration_images": arguments.samples,
        "rows": [
            {"name": candidate.name, **asdict(evaluation), **asdict(row)}
            for candidate, evaluation, row in zip(candidates, evaluations, rows, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
