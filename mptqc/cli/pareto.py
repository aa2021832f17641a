"""`mptqc pareto`: the accuracy/size curve of a plan's path, as CSV, JSON and PNG."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mptqc.analysis.pareto import PathPoint, path_points
from mptqc.errors import OutputError
from mptqc.graph.files import write_together
from mptqc.plan import load_plan


def pareto(
    plan: Annotated[Path, typer.Argument(help="A plan that `mptqc compile` wrote with a budget (.json).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for pareto.csv, pareto.json, pareto.png.")],
) -> None:
    """Write the accuracy/size curve that a search for bits passed; `mptqc apply --at` emits any point of it.

    JSON and CSV keys, one row a point: step, variable, bits, average_weight_bits, average_activation_bits, bytes, loss,
    accuracy. null or empty where a point was not measured.
    """
    points = path_points(load_plan(plan))
    picture = draw(points)
    rows = [dataclasses.asdict(point) for point in points]
    try:
        output.mkdir(parents=True, exist_ok=True)
        contents = {"csv": as_csv(rows), "json": json.dumps(rows, indent=1).encode(), "png": picture}
        write_together({output / f"pareto.{ending}": content for ending, content in contents.items()})
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}; choose another folder") from error
    typer.echo(f"wrote pareto.csv, pareto.json and pareto.png to {output}: {len(points)} points")
    typer.echo(describe_point(points[-1]))


def describe_point(point: PathPoint) -> str:
    """One line for people."""
    loss = "" if point.loss is None else f"; loss {point.loss:.3g} before compensation"
    return (
        f"average bits: weights {point.average_weight_bits:.3f}, activations {point.average_activation_bits:.3f}; "
        f"{point.bytes:,} bytes by the budget's arithmetic{loss}"
    )


def as_csv(rows: Sequence[dict[str, object]]) -> bytes:
    """A header and a line a row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def draw(points: Sequence[PathPoint]) -> bytes:
    """Loss, and accuracy where there is one, over the size of the file; PNG.

    Raises:
        OutputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("the picture needs matplotlib: pip install 'mptqc[plot]'") from error
    measured = [point for point in points if point.loss is not None]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="file, MB", ylabel="loss (weights not compensated)", yscale="log")
    sizes = [point.bytes / 1e6 for point in measured]
    axes.plot(sizes, np.array([point.loss for point in measured], float), "o-", color="tab:blue", markersize=3)
    if measured[0].accuracy is not None:
        other = axes.twinx()
        other.set_ylabel("accuracy on the scoring images")
        other.plot(
            sizes, np.array([point.accuracy for point in measured], float), "s--", color="tab:orange", markersize=3
        )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
