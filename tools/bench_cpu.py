"""Time vision transformers on the CPU in every form that runs in ONNX Runtime; print Markdown tables.

    python tools/bench_cpu.py [--models vit-s,swin-t] [--batches 1,8] [--threads 1,2] [--output bench-cpu]

Weights are random and nothing is searched: how fast a model runs depends on its shape. Needs the `export` extra, for
the models' graphs. All forms of a model take turns within one process; a ratio is the median over rounds of (float's
time / the form's own). Models are kept in the output folder and made only where they are not there; results.json, with
all figures, is written anew.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime
from peers import write_dynamic_int8, write_static_int8

import mptqc
from mptqc import api
from mptqc.cli.progress import progress
from mptqc.data.load import load_samples
from mptqc.export.timm_models import export_timm
from mptqc.graph.io import save_model
from mptqc.runtime.benchmark import BenchmarkRow, benchmark
from mptqc.runtime.library import chosen_isa, find_library, load_library
from mptqc.runtime.machine import core_count, cpu_info, processor_name

MODELS: Mapping[str, str] = MappingProxyType(
    {
        "vit-s": "vit_small_patch16_224",
        "vit-b": "vit_base_patch16_224",
        "deit-t": "deit_tiny_patch16_224",
        "swin-t": "swin_tiny_patch4_window7_224",
    }
)
FORMS = ("float32", "ORT static", "ORT dynamic", "portable", "cpu", "cpu-native", "portable W4A4", "cpu-native W4A4")
IMAGE = (3, 224, 224)
CALIBRATION_IMAGES = 4
QUICK = MappingProxyType(
    {
        "samples": CALIBRATION_IMAGES,
        "range_method": "min-max",
        "smoothing": False,
        "attention_folds": False,
        "compensation": False,
    }
)


def main() -> None:
    """Make what is missing, measure and print."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for model in arguments.models:
        files = {form: arguments.output / f"{model}.{form.replace(' ', '-').lower()}.onnx" for form in FORMS}
        make_missing(files, model)
        for batch in arguments.batches:
            for threads in arguments.threads:
                with progress(f"{model}, batch {batch}, {threads} thread(s)") as report:
                    measured = benchmark(
                        list(files.values()),
                        batch=batch,
                        threads=threads,
                        min_seconds=arguments.seconds,
                        progress=report,
                    )
                print(as_markdown(model, measured), flush=True)
                rows += [{"form": form, **asdict(row)} for form, row in zip(files, measured, strict=True)]
    (arguments.output / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(conditions())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names_of_models, default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each form, and at least 10 rounds")
    parser.add_argument("--output", type=Path, default=Path("bench-cpu"))
    return parser.parse_args()


def names_of_models(text: str) -> list[str]:
    """Names of MODELS, separated by commas."""
    found = text.split(",")
    unknown = [name for name in found if name not in MODELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; the models are {', '.join(MODELS)}")
    return found


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def make_missing(files: Mapping[str, Path], model: str) -> None:
    """Write each form that is not there: the float model, ONNX Runtime's own two, and ours."""
    original = files["float32"]
    if not original.is_file():
        export_timm(MODELS[model], original, pretrained=False)
    images = original.with_suffix(".npz")
    if not images.is_file():
        size = (CALIBRATION_IMAGES, *IMAGE)
        np.savez(images, images=np.random.default_rng(0).standard_normal(size, dtype=np.float32))
    if not files["ORT static"].is_file():
        samples = load_samples(images, input_name="images", input_shape=(None, *IMAGE), preprocessing=None)
        write_static_int8(original, files["ORT static"], samples, "images")
    if not files["ORT dynamic"].is_file():
        write_dynamic_int8(original, files["ORT dynamic"])
    for suffix, preset in (("", "w8a8"), (" W4A4", "w4a4")):
        portable = files[f"portable{suffix}"]
        if not portable.is_file():
            mptqc.compile(original, images, preset=preset, options=dict(QUICK)).save(portable)
        for target in ("cpu", "cpu-native"):
            lowered = files.get(f"{target}{suffix}")
            if lowered is not None and not lowered.is_file():
                save_model(api.lower(portable, target=target).model, lowered)


def as_markdown(model: str, rows: Sequence[BenchmarkRow]) -> str:
    """One table: a line a form."""
    first = rows[0]
    clock = "CPU time" if first.clock == "cpu" else "wall time"
    lines = [
        f"\n{model}, batch {first.batch}, {first.threads} thread(s), {first.rounds} rounds, {clock}\n",
        "| form | MB | products int / float | median ms | p10..p90 | × float32 |",
        "|--|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {form} | {row.file_bytes / 1e6:.1f} | {row.integer_matmuls} / {row.float_matmuls} | {row.median_ms:.2f} "
        f"| {row.p10_ms:.2f}..{row.p90_ms:.2f} | {row.speedup:.2f} |"
        for form, row in zip(FORMS, rows, strict=True)
    ]
    return "\n".join(lines)


def conditions() -> str:
    """What the times hold for."""
    library = find_library()
    kernels = "none" if library is None else chosen_isa(load_library(library))
    return (
        f"\n{processor_name(cpu_info())}, {core_count()} cores, onnxruntime {onnxruntime.__version__}, kernel library: "
        f"{kernels}"
    )


if __name__ == "__main__":
    main()
