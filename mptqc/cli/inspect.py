"""`mptqc inspect`: what a compiled model holds, layer by layer."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mptqc.analysis.inspect import Inspection, OperandRow, inspect_model
from mptqc.cli.options import JsonOption

PIPED_WIDTH = 120


def inspect(
    model: Annotated[Path, typer.Argument(help="The compiled ONNX model.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a compiled model holds: per layer bits, scales, smoothing, bytes.

    JSON keys: target; layers: site, kind, operand, weight_bits, activation_bits, scale, zero_point, quantizer, m,
    split, low_codes, alpha, weight_bytes, trellis, exponents; totals: integer_linears, integer_attentions,
    quantized_tensors, float_linears, average_weight_bits, average_activation_bits, weight_bytes, other_bytes,
    file_bytes, budget_bytes. null where there is no such figure.
    """
    inspection = inspect_model(model)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(inspection)))
        return
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(_layers_table(inspection))
    console.print(_totals_table(inspection))


def _layers_table(inspection: Inspection) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("site", "operand"):
        table.add_column(title, no_wrap=True)
    for title in ("weight bits", "bits", "scale", "zero point"):
        table.add_column(title, justify="right")
    table.add_column("quantizer")
    for title in ("alpha", "weight bytes"):
        table.add_column(title, justify="right")
    for row in inspection.layers:
        table.add_row(
            row.site,
            row.operand,
            f"{_or_dash(row.weight_bits)}{', trellis' if row.trellis else ''}",
            str(row.activation_bits),
            f"{row.scale:.4g}",
            str(row.zero_point),
            _quantizer(row),
            _or_dash(row.alpha),
            f"{row.weight_bytes:,}" if row.weight_bytes else "-",
        )
    return table


def _totals_table(inspection: Inspection) -> Table:
    table = Table("total", "value", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, value in dataclasses.asdict(inspection.totals).items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    table.add_row("target", inspection.target)
    return table


def _quantizer(row: OperandRow) -> str:
    if row.m is None:
        return f"{row.quantizer}, exponents" if row.exponents else row.quantizer
    m, split = (",".join(map(str, numbers or ())) for numbers in (row.m, row.split))
    return f"m={m} split={split} low={row.low_codes}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
