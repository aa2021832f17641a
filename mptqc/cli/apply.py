"""`mptqc apply`: rebuild a compiled model from the float model and a plan."""

from pathlib import Path
from typing import Annotated

import typer

from mptqc import api


def apply(
    model: Annotated[Path, typer.Argument(help="The float ONNX model that the plan was made from.")],
    plan: Annotated[Path, typer.Argument(help="The plan (.json; its .safetensors lies beside it).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    convert_fp16: Annotated[
        bool, typer.Option("--convert-fp16", help="As it was given to compile, for a float16 model.")
    ] = False,
) -> None:
    """Rebuild a compiled model from a plan, with no data, byte for byte."""
    api.check_output(output)
    result = api.apply(model, plan, convert_fp16=convert_fp16)
    result.save(output)
    typer.echo(f"wrote {output}: {model.stat().st_size / 1e6:.2f} MB -> {output.stat().st_size / 1e6:.2f} MB")
