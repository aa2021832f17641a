"""`mptqc doctor`: what this machine can run."""

import dataclasses
import json
import sys

import typer
from rich.console import Console
from rich.table import Table

from mptqc.cli.options import JsonOption
from mptqc.runtime.diagnosis import FLAVOURS, Diagnosis, diagnose

UNWRAPPED = 2000  # columns for what reads a pipe: paths stay in one piece


def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can run, what is missing, and how to get it.

    JSON keys: mptqc, python, platform, packages, onnxruntime_flavour, providers (built_in, starts, reason of each),
    processor, cores, cpu_features, kernel_library, cuda_kernel_library, warnings, missing (what, how of each).
    """
    diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(diagnosis)))
    else:
        _print_tables(diagnosis)


def _print_tables(diagnosis: Diagnosis) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("mptqc", f"{diagnosis.mptqc}, Python {diagnosis.python}, {diagnosis.platform}")
    has_runtime = any(diagnosis.packages[flavour] for flavour in FLAVOURS)
    for name, version in diagnosis.packages.items():
        if version or not (has_runtime and name in FLAVOURS):  # one of them is enough
            table.add_row(name, version or "not installed")
    for name, state in diagnosis.providers.items():
        table.add_row(f"provider {name}", "starts" if state.starts else f"does not start: {state.reason}")
    table.add_row("processor", f"{diagnosis.processor}, {diagnosis.cores} cores")
    table.add_row("cpu features", _features_text(diagnosis))
    table.add_row("kernel library", diagnosis.kernel_library)
    table.add_row("CUDA kernel library", diagnosis.cuda_kernel_library)
    for warning in diagnosis.warnings:
        table.add_row("warning", warning)
    for item in diagnosis.missing:
        table.add_row("missing", f"{item.what}: {item.how}")
    width = None if sys.stdout.isatty() else UNWRAPPED
    Console(highlight=False, markup=False, width=width).print(table)


def _features_text(diagnosis: Diagnosis) -> str:
    features = diagnosis.cpu_features
    if features is None:
        return "unknown on this system"
    return " ".join(f"{name}={'yes' if present else 'no'}" for name, present in features.items())
