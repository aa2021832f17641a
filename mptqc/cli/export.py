"""`mptqc export`: a timm or transformers model, by name, as a float ONNX file."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mptqc.errors import RecipeError
from mptqc.export import export_timm, export_transformers


def export(
    name: Annotated[
        str,
        typer.Argument(
            help="timm model, such as vit_small_patch16_224 (vit_*, deit_*, swin_*, beit_*, eva02_*, ...); or, with a "
            "slash, a transformers model on the hub (ViT, DINOv3, CLIP, ...) or a folder written by save_pretrained."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    random: Annotated[
        bool, typer.Option("--random", help="Seeded random weights: the structure only, nothing is downloaded.")
    ] = False,
    exporter: Annotated[
        Literal["dynamo", "torchscript"], typer.Option(help="Which of torch's exporters writes the file.")
    ] = "dynamo",
    opset: Annotated[int | None, typer.Option(help="ONNX opset (default: 20 for dynamo, 17 for torchscript).")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the square input (default: the model's own).")] = None,
    batch: Annotated[int | None, typer.Option(help="A fixed batch size (default: dynamic).")] = None,
    fused_attention: Annotated[
        bool, typer.Option("--fused-attention", help="One Attention operator per block (dynamo, opset 23 and later).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Export a timm or transformers vision transformer to float ONNX, its preprocessing in the file's metadata."""
    if "/" in name or Path(name).is_dir():
        if image_size is not None or fused_attention:
            raise RecipeError(f"--image-size and --fused-attention are for timm models, not for {name!r}.")
        export_transformers(name, output, pretrained=not random, opset=opset, exporter=exporter, batch=batch, seed=seed)
    else:
        export_timm(
            name,
            output,
            pretrained=not random,
            image_size=image_size,
            opset=opset,
            exporter=exporter,
            batch=batch,
            fused_attention=fused_attention,
            seed=seed,
        )
    typer.echo(f"wrote {output}")
