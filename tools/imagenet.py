"""Rebuild the paper's ImageNet tables: top-1 of ViT, DeiT and Swin with timm's weights, compiled at several widths.

    python tools/imagenet.py --data DIR [--models ViT-S Swin-T] [--presets w4a4] [--samples 128] [--limit 5000]
    python tools/imagenet.py --data DIR --random-weights      where no model hub can be reached: SQNR, no accuracy

DIR holds train/<wnid>/*.JPEG, to calibrate with, and val/<wnid>/*.JPEG, to test with; the sorted wnids are the classes
in timm's order. Each figure goes to --output as soon as it is known, one JSON line each, so that the same command goes
on where an earlier one was stopped. Prints a Markdown table of all that the file holds.

The paper's 5-bit fully quantized models with mixed precision are missing: mptqc cannot make them yet.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import onnxruntime
from pydantic import BaseModel, ConfigDict, ValidationError

import mptqc
from mptqc.api import check_output
from mptqc.cli.progress import progress
from mptqc.compiler import compile_model
from mptqc.data.load import load_samples
from mptqc.data.preprocess_sources import choose_preprocessing
from mptqc.errors import DataError, MptqcError, OutputError
from mptqc.export import export_timm
from mptqc.graph.io import save_model
from mptqc.recipe import PRESETS, make_recipe
from mptqc.runtime.evaluate import Evaluation, evaluate, usable_labels
from mptqc.runtime.model_io import image_input, metadata
from mptqc.runtime.session import create_session

logger = logging.getLogger(__name__)

# Weights are named by tag: some of timm's defaults are newer than those that papers on quantization start from.
MODELS: Mapping[str, str] = MappingProxyType(
    {
        "ViT-S": "vit_small_patch16_224.augreg_in21k_ft_in1k",
        "ViT-B": "vit_base_patch16_224.augreg_in21k_ft_in1k",
        "DeiT-T": "deit_tiny_patch16_224.fb_in1k",
        "DeiT-S": "deit_small_patch16_224.fb_in1k",
        "DeiT-B": "deit_base_patch16_224.fb_in1k",
        "Swin-T": "swin_tiny_patch4_window7_224.ms_in1k",
        "Swin-S": "swin_small_patch4_window7_224.ms_in1k",
        "Swin-B": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    }
)
FLOAT = "float32"
LINE_START = b'{"model":'  # of every line in the results file
NOTES = (
    "The paper (arXiv 2401.14895) states in its abstract, as top-1 above earlier methods: 0.90 to 23.35 points on "
    "4-bit ViTs with single precision; 3.82 to 78.14 points on 5-bit fully quantized ViTs with mixed precision. The "
    "latter models are missing here: mptqc cannot make them yet."
)


class Export(Protocol):
    """Writes the model that timm calls `name`, with its preprocessing in the file; `export_timm` does."""

    def __call__(self, name: str, output: Path, *, pretrained: bool, seed: int) -> None:
        """Write `output`."""


class Conditions(BaseModel):
    """All that a figure depends on besides model and preset; figures of one table share it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    samples: int
    limit: int | None
    seed: int
    random_weights: bool
    mptqc: str
    onnxruntime: str


class Cell(BaseModel):
    """One line of the results file: a model of MODELS at a preset, or at FLOAT."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    preset: str
    evaluation: Evaluation
    conditions: Conditions


def main(command_line: Sequence[str] | None = None, export: Export = export_timm) -> None:
    """Measure what the results file does not hold yet; print its table, also when stopped on the way."""
    arguments = parse_arguments(command_line)
    try:
        run(arguments, export)
    except MptqcError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; without choices, all of the paper's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds train/ and val/")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--presets", nargs="+", default=["w8a8", "w6a6", "w4a4", "w3a3"], choices=list(PRESETS))
    parser.add_argument("--samples", type=int, default=128, help="calibration images, drawn from train/")
    parser.add_argument("--limit", type=int, help="test images, drawn from val/; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of both draws, the compiler and random weights")
    parser.add_argument("--threads", type=int, default=0, help="of each evaluation; 0 takes every core")
    parser.add_argument("--random-weights", action="store_true", help="no download; gives SQNR, no accuracy")
    parser.add_argument("--output", type=Path, default=Path("imagenet.jsonl"), help="the results, kept between runs")
    return parser.parse_args(command_line)


def run(arguments: argparse.Namespace, export: Export) -> None:
    """Do what the command line says."""
    conditions = conditions_of(arguments)
    cells = read_cells(arguments.output, conditions)
    try:
        for name in arguments.models:
            wanted = [*([] if arguments.random_weights else [FLOAT]), *arguments.presets]
            missing = [preset for preset in wanted if (name, preset) not in cells]
            if missing:
                for preset, evaluation in measure(name, missing, arguments, export):
                    cell = Cell(model=name, preset=preset, evaluation=evaluation, conditions=conditions)
                    append_cell(arguments.output, cell)
                    cells[name, preset] = evaluation
    finally:
        print_table(cells, conditions)


def conditions_of(arguments: argparse.Namespace) -> Conditions:
    """What the figures of this run depend on.

    Raises:
        DataError: a folder is missing.
    """
    for part in ("train", "val"):
        if not (arguments.data / part).is_dir():
            raise DataError(
                f"{arguments.data / part} is no folder; --data takes one that holds train/ and val/, with a sub-folder "
                "for each class in both."
            )
    return Conditions(
        data=str(arguments.data.resolve()),
        samples=arguments.samples,
        limit=arguments.limit,
        seed=arguments.seed,
        random_weights=arguments.random_weights,
        mptqc=mptqc.__version__,
        onnxruntime=onnxruntime.__version__,
    )


def measure(
    name: str, presets: Sequence[str], arguments: argparse.Namespace, export: Export
) -> Iterator[tuple[str, Evaluation]]:
    """Export one model, compile it at each preset; yield the figures on val/ one by one.

    Raises:
        ModelError: the weights cannot be had.
        DataError: pictures that cannot be read, or whose classes are not the model's.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, compiled = Path(folder) / "float.onnx", Path(folder) / "compiled.onnx"
        export(MODELS[name], model, pretrained=not arguments.random_weights, seed=arguments.seed)
        reference = create_session(model, threads=arguments.threads)
        value = image_input(reference)
        preprocessing = choose_preprocessing(
            source=None, mean=None, std=None, metadata=metadata(reference), image_size=value.image_size
        )
        calibration, test = (
            load_samples(
                arguments.data / part,
                input_name=value.name,
                input_shape=value.shape,
                preprocessing=preprocessing,
                limit=limit,
                seed=arguments.seed,
            )
            for part, limit in (("train", arguments.samples), ("val", arguments.limit))
        )
        classes = reference.get_outputs()[0].shape[1]
        if not arguments.random_weights and usable_labels(test, classes) is None:
            raise DataError(
                f"{arguments.data / 'val'} does not give the class of each picture; {name} takes {classes} sub-folders "
                "there, one for each class."
            )
        for preset in presets:
            with progress(f"{name} {preset}") as report:
                if preset == FLOAT:
                    evaluation = evaluate(reference, test, progress=report)
                else:
                    recipe = make_recipe(preset, options={"samples": arguments.samples, "seed": arguments.seed})
                    save_model(compile_model(model, calibration, recipe, report=report).model, compiled)
                    evaluation = evaluate(
                        compiled, test, reference=reference, threads=arguments.threads, progress=report
                    )
            yield preset, evaluation


def read_cells(path: Path, conditions: Conditions) -> dict[tuple[str, str], Evaluation]:
    """The figures in the results file by model and preset; none if there is no file yet.

    A line that is the beginning of one was being written when an earlier run was stopped; a warning tells of it.

    Raises:
        OutputError: the file cannot be written or read, is none of ours, or was made under other conditions.
    """
    if not path.exists():
        check_output(path)
        return {}
    try:
        with path.open("r+b") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise OutputError(f"{path} cannot hold the results ({error}); name another file with --output.") from error
    cells = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            cell = Cell.model_validate_json(line)
        except ValidationError as error:
            if error.errors()[0]["type"] == "json_invalid" and LINE_START.startswith(line[: len(LINE_START)]):
                logger.warning("line %d of %s is half written; what it was to hold is measured again", number, path)
                continue
            raise OutputError(
                f"line {number} of {path} is no result of this tool; name another file with --output."
            ) from error
        check_conditions(path, cell.conditions, conditions)
        cells[cell.model, cell.preset] = cell.evaluation
    return cells


def check_conditions(path: Path, found: Conditions, wanted: Conditions) -> None:
    """See that an old figure belongs in the same table as the new ones.

    Raises:
        OutputError: it was measured under other conditions.
    """
    old, new = found.model_dump(), wanted.model_dump()
    changed = [f"{key} {old[key]} (now {new[key]})" for key in old if old[key] != new[key]]
    if changed:
        raise OutputError(
            f"{path} holds results of other conditions: {', '.join(changed)}. Name another file with --output, or run "
            "with those."
        )


def append_cell(path: Path, cell: Cell) -> None:
    """Add one line, on the disk before this returns; a half-written line before it stays a line of its own."""
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(cell.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def print_table(cells: Mapping[tuple[str, str], Evaluation], conditions: Conditions) -> None:
    """Print top-1 of every model and preset measured so far; with random weights, SQNR against float instead."""
    if not cells:
        return
    presets = [preset for preset in (FLOAT, *PRESETS) if any(done == preset for _, done in cells)]
    images = next(iter(cells.values())).images
    shown = "random weights, so no accuracy: SQNR against float in dB" if conditions.random_weights else "top-1 in %"
    print(f"\nImageNet, {conditions.samples} calibration images, {images} test images; {shown}\n")
    print(f"| | {' | '.join(preset if preset == FLOAT else preset.upper() for preset in presets)} |")
    print(f"|--|{'--:|' * len(presets)}")
    for name in MODELS:
        row = [cells.get((name, preset)) for preset in presets]
        if any(row):
            print(f"| {name} | {' | '.join(figure(cell, conditions) for cell in row)} |")
    if not conditions.random_weights:
        print(f"\n{NOTES}")


def figure(evaluation: Evaluation | None, conditions: Conditions) -> str:
    """The figure of a table cell; empty if it is not measured yet."""
    if evaluation is None:
        return ""
    if conditions.random_weights:
        return "–" if evaluation.sqnr_db is None else f"{evaluation.sqnr_db:.1f}"
    return "–" if evaluation.top1 is None else f"{100 * evaluation.top1:.2f}"


if __name__ == "__main__":
    main()
