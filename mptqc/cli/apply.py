"""`mptqc apply`: rebuild a compiled model from the float model and a plan."""

from pathlib import Path
from typing import Annotated

import typer

from mptqc import api
from mptqc.analysis.pareto import point_at
from mptqc.cli.options import MeanOption, PreprocessOption, StdOption, parse_floats
from mptqc.cli.pareto import describe_point
from mptqc.cli.progress import progress
from mptqc.plan import load_plan


def apply(
    model: Annotated[Path, typer.Argument(help="The float ONNX model that the plan was made from.")],
    plan: Annotated[Path, typer.Argument(help="The plan (.json; its .safetensors lies beside it).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    at: Annotated[
        float | None,
        typer.Option("--at", help="Average bits: emit this point of the plan's path, not the one that was compiled."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="With --at: images to compensate the weights with, which else are rounded."),
    ] = None,
    preprocess: PreprocessOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    convert_fp16: Annotated[
        bool, typer.Option("--convert-fp16", help="As it was given to compile, for a float16 model.")
    ] = False,
) -> None:
    """Rebuild a compiled model from a plan, with no data, byte for byte; or another point of its path (--at)."""
    api.check_output(output)
    with progress("apply") as report:
        result = api.apply(
            model,
            plan,
            convert_fp16=convert_fp16,
            at=at,
            calibration=calibration,
            preprocess=preprocess,
            mean=parse_floats(mean, option="--mean"),
            std=parse_floats(std, option="--std"),
            report=report,
        )
    result.save(output)
    typer.echo(f"wrote {output}: {model.stat().st_size / 1e6:.2f} MB -> {output.stat().st_size / 1e6:.2f} MB")
    if at is not None:
        typer.echo(describe_point(point_at(load_plan(plan), at)))
        if calibration is None:
            typer.echo(
                "weights are rounded at searched scales, not compensated, unless this is the compiled point itself: "
                "compensated codes exist for that alone; give --calibration to compensate these"
            )
