"""`mptqc benchmark`: models timed side by side."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import onnxruntime
import typer
from rich.console import Console
from rich.table import Table

from mptqc.cli.options import JsonOption, ProviderOption, parse_ints
from mptqc.cli.progress import progress
from mptqc.runtime import benchmark as runtime
from mptqc.runtime.machine import core_count, cpu_info, processor_name


def benchmark(
    models: Annotated[list[Path], typer.Argument(help="ONNX models; speed-ups are against the first.")],
    batch: Annotated[int, typer.Option("--batch", help="Images a run.")] = 1,
    threads: Annotated[int, typer.Option("--threads", help="0 takes every core.")] = 1,
    provider: ProviderOption = "cpu",
    shape: Annotated[
        str | None, typer.Option("--shape", help="Input dimensions after the batch, where the model's are dynamic.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Time spent on each model, at least 10 rounds.")] = 2.0,
    repeats: Annotated[int | None, typer.Option("--repeats", help="Exactly so many rounds instead.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random input.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Time models side by side and count the operators that really run.

    The models take turns, so that a machine whose speed drifts is fair to all. With one CPU thread the clock is CPU
    time.

    JSON keys: machine (processor, cores, onnxruntime) and rows, one a model: model, median_ms, p10_ms, p90_ms, speedup,
    file_bytes, integer_matmuls, float_matmuls, fused_ops, batch, threads, provider, rounds, clock.
    """
    with progress("benchmark") as report:
        rows = runtime.benchmark(
            models,
            batch=batch,
            threads=threads,
            provider=provider,
            min_seconds=seconds,
            repeats=repeats,
            shape=parse_ints(shape, option="--shape"),
            seed=seed,
            progress=report,
        )
    machine: dict[str, str | int] = {
        "processor": processor_name(cpu_info()),
        "cores": core_count(),
        "onnxruntime": onnxruntime.__version__,
    }
    if as_json:
        typer.echo(json.dumps({"machine": machine, "rows": [dataclasses.asdict(row) for row in rows]}))
    else:
        _print_table(rows, machine)


def _print_table(rows: Sequence[runtime.BenchmarkRow], machine: dict[str, str | int]) -> None:
    first = rows[0]
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for title in ("median ms", "p10..p90", "speedup", "MB", "integer", "float"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            Path(row.model).name,
            f"{row.median_ms:.2f}",
            f"{row.p10_ms:.2f}..{row.p90_ms:.2f}",
            f"{row.speedup:.2f} x",
            f"{row.file_bytes / 1e6:.2f}",
            str(row.integer_matmuls),
            str(row.float_matmuls),
        )
    console = Console(markup=False)
    console.print(table)
    console.print("integer, float: matrix products that run in integers and in float", style="dim")
    console.print(
        f"batch {first.batch}, {first.threads or 'all'} thread(s), {first.provider}, {first.rounds} rounds, "
        f"{first.clock} time; {machine['processor']}, {machine['cores']} cores, onnxruntime {machine['onnxruntime']}",
        style="dim",
        highlight=False,
    )
