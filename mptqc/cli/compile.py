"""`mptqc compile`: a float ONNX vision transformer in, an integer one out."""

from pathlib import Path
from typing import Annotated

import typer

from mptqc import api
from mptqc.cli.lower import echo_lowering
from mptqc.cli.options import MeanOption, PreprocessOption, StdOption, parse_floats
from mptqc.cli.progress import progress
from mptqc.errors import RecipeError


def compile(
    model: Annotated[Path, typer.Argument(help="The float ONNX model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    calibration: Annotated[
        Path, typer.Option("--calibration", help="A folder of images, an .npz (images or the input's name), an .npy.")
    ],
    preset: Annotated[str | None, typer.Option("--preset", help="w8a8, w6a6, w5a5, w4a4, w3a3, w4a8, w3a8.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A TOML file of recipe keys.")] = None,
    weight_bits: Annotated[int | None, typer.Option("--weight-bits", help="2 to 8 (default: 8).")] = None,
    activation_bits: Annotated[int | None, typer.Option("--activation-bits", help="2 to 8 (default: 8).")] = None,
    end_bits: Annotated[
        int | None, typer.Option("--end-bits", help="Of the patch embedding and the head (default: 8).")
    ] = None,
    coverage: Annotated[str | None, typer.Option("--coverage", help="partial.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="portable (standard ONNX), cpu (com.microsoft ops), cpu-native or cuda (both need a kernel library of "
            "mptqc), or tensorrt (symmetric QDQ, untested) (default: portable).",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Calibration images used, at most (default: 64).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of every random choice (default: 0).")] = None,
    range_method: Annotated[
        str | None, typer.Option("--range-method", help="min-max, percentile, mse or output (default: output).")
    ] = None,
    rotation: Annotated[
        bool | None, typer.Option("--rotation/--no-rotation", help="Rotate residual streams and heads (default: off).")
    ] = None,
    views: Annotated[
        int | None,
        typer.Option("--views", help="Augmented views of each calibration image, itself included (default: 1)."),
    ] = None,
    smoothing: Annotated[bool | None, typer.Option("--smoothing/--no-smoothing", help="SQ-b (default: on).")] = None,
    opt_m: Annotated[
        bool | None, typer.Option("--opt-m/--no-opt-m", help="Two-region quantizers (default: on).")
    ] = None,
    attention_folds: Annotated[
        bool | None,
        typer.Option("--attention-folds/--no-attention-folds", help="Shifts and scales of q, k, v (default: on)."),
    ] = None,
    compensation: Annotated[
        bool | None,
        typer.Option(
            "--compensation/--no-compensation", help="Ridge, GPTQ and bias refit, Linear by Linear (default: on)."
        ),
    ] = None,
    plan_out: Annotated[
        Path | None, typer.Option("--plan-out", help="Write the plan too: PLAN.json and PLAN.safetensors.")
    ] = None,
    preprocess: PreprocessOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    convert_fp16: Annotated[
        bool, typer.Option("--convert-fp16", help="Take a float16 model, converting it to float32 first.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the result and check it against the numpy reference.")
    ] = True,
) -> None:
    """Compile a float ONNX vision transformer into one that runs in integers.

    Single options win over the recipe file, which wins over the preset. Without --preprocess, --mean or --std the
    preprocessing is the one in the model's metadata; what was used is stored in the compiled model.
    """
    if output.resolve() == model.resolve():
        raise RecipeError(f"-o {output} is the model itself; give another file, the float model is needed again")
    if plan_out is not None and plan_out.suffix != ".json":
        raise RecipeError(
            f"--plan-out {plan_out}: a plan's name ends in .json (its arrays go to .safetensors beside it)"
        )
    for path in (output, plan_out):
        if path is not None:
            api.check_output(path)
    options = {
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "end_bits": end_bits,
        "coverage": coverage,
        "target": target,
        "samples": samples,
        "seed": seed,
        "range_method": range_method,
        "rotation": rotation,
        "views": views,
        "smoothing": smoothing,
        "opt_m": opt_m,
        "attention_folds": attention_folds,
        "compensation": compensation,
    }
    with progress("compile") as report:
        result = api.compile(
            model,
            calibration,
            preset=preset,
            recipe=recipe,
            preprocess=preprocess,
            mean=parse_floats(mean, option="--mean"),
            std=parse_floats(std, option="--std"),
            convert_fp16=convert_fp16,
            options=options,
            verify=verify,
            report=report,
        )
    result.save(output, plan_out)
    typer.echo(f"wrote {output}: {model.stat().st_size / 1e6:.2f} MB -> {output.stat().st_size / 1e6:.2f} MB")
    typer.echo(result.report.summary())
    for refusal in result.plan.refusals:
        typer.echo(f"left alone: {refusal.what} at {refusal.site}: {refusal.reason}")
    if result.plan.recipe.target.is_native:
        echo_lowering(result.model)
