"""`mptqc lower`: a compiled portable file in, the same with the operators of another target out."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import typer

from mptqc import api
from mptqc.errors import RecipeError
from mptqc.graph.native_nodes import lowering_report
from mptqc.recipe import Target


def lower(
    model: Annotated[Path, typer.Argument(help="A compiled ONNX model, of target portable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="cpu-native or cuda (both need a kernel library of mptqc), cpu (com.microsoft ops), or tensorrt "
            "(symmetric QDQ, untested).",
        ),
    ] = Target.CPU_NATIVE,
    float16: Annotated[
        bool, typer.Option("--float16/--no-float16", help="With target cuda, run what stays float in float16.")
    ] = True,
) -> None:
    """Rewrite a compiled portable file with faster operators, without the float model."""
    if output.resolve() == model.resolve():
        raise RecipeError(f"-o {output} is the model itself; give another file")
    api.check_output(output)
    result = api.lower(model, target=target, float16=float16)
    result.save(output)
    typer.echo(f"wrote {output}: {model.stat().st_size / 1e6:.2f} MB -> {output.stat().st_size / 1e6:.2f} MB")
    if Target(target).is_native:
        echo_lowering(result.model)


def echo_lowering(model: ir.Model) -> None:
    """Say what became operators of ai.mptqc, and what did not and why."""
    report = lowering_report(model)
    counts = Counter(each.op for each in report if not each.reason)
    typer.echo(f"lowered: {', '.join(f'{count} {op}' for op, count in counts.most_common())}")
    for each in report:
        if each.reason:
            typer.echo(f"not lowered: {each.site} to {each.op}: {each.reason}")
