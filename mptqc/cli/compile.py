"""`mptqc compile`: a float ONNX vision transformer in, an integer one out."""

from pathlib import Path
from typing import Annotated

import typer

from mptqc import api
from mptqc.analysis.bit_variables import REDUCED_BITS
from mptqc.analysis.pareto import path_points
from mptqc.cli.lower import echo_lowering
from mptqc.cli.options import MeanOption, PreprocessOption, StdOption, parse_bytes, parse_floats
from mptqc.cli.pareto import describe_point
from mptqc.cli.progress import progress
from mptqc.errors import RecipeError


def compile(
    model: Annotated[Path, typer.Argument(help="The float ONNX model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    calibration: Annotated[
        Path, typer.Option("--calibration", help="A folder of images, an .npz (images or the input's name), an .npy.")
    ],
    preset: Annotated[
        str | None, typer.Option("--preset", help="w8a8, w6a6, w5a5, w4a4, w3a3, w6a8, w4a8, w3a8, w2a8.")
    ] = None,
    effort: Annotated[
        str,
        typer.Option(
            "--effort",
            help="fast (64 images), balanced (up to 512; fewer are shown in up to 4 views each) or best (up to 2048). "
            "A ViT-S on 2 cores takes some 1.5, 4 and 13 minutes.",
        ),
    ] = "balanced",
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A TOML file of recipe keys.")] = None,
    weight_bits: Annotated[int | None, typer.Option("--weight-bits", help="2 to 8 (default: 8).")] = None,
    activation_bits: Annotated[int | None, typer.Option("--activation-bits", help="2 to 8 (default: 8).")] = None,
    end_bits: Annotated[
        int | None, typer.Option("--end-bits", help="Of the patch embedding and the head (default: 8).")
    ] = None,
    trellis: Annotated[
        bool | None,
        typer.Option(
            "--trellis/--no-trellis",
            help="Code weights of 2 to 5 bits by a trellis: nearer to float at the same size, takes longer to "
            "compile and to load (default: on with w4a8, w3a8 and w2a8).",
        ),
    ] = None,
    reduce_range: Annotated[
        bool | None,
        typer.Option(
            "--reduce-range/--full-range",
            help="7 instead of 8 bits for weights, k and v: exact on CPUs without VNNI too (default: reduced).",
        ),
    ] = None,
    coverage: Annotated[str | None, typer.Option("--coverage", help="partial or full (default: partial).")] = None,
    stream_exponents: Annotated[
        bool | None,
        typer.Option(
            "--stream-exponents/--no-stream-exponents",
            help="With full coverage, powers of two per channel compete for what norms read (default: on).",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="portable (standard ONNX), cpu (com.microsoft ops), cpu-native or cuda (both need a kernel library of "
            "mptqc), or tensorrt (symmetric QDQ, untested) (default: portable).",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Calibration images used, at most (default: by effort).")
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
        typer.Option(
            "--views", help="Augmented views of a calibration image, itself included, at most (default: by effort)."
        ),
    ] = None,
    smoothing: Annotated[bool | None, typer.Option("--smoothing/--no-smoothing", help="SQ-b (default: on).")] = None,
    opt_m: Annotated[
        bool | None, typer.Option("--opt-m/--no-opt-m", help="Quantizers of up to four regions (default: on).")
    ] = None,
    attention_folds: Annotated[
        bool | None,
        typer.Option("--attention-folds/--no-attention-folds", help="Shifts and scales of q, k, v (default: on)."),
    ] = None,
    row_scale: Annotated[
        bool | None,
        typer.Option("--row-scale/--no-row-scale", help="A scale for each row of probabilities (default: on)."),
    ] = None,
    gelu_folds: Annotated[
        bool | None,
        typer.Option("--gelu-folds/--no-gelu-folds", help="A scale per channel between GELU and fc2 (default: on)."),
    ] = None,
    float16: Annotated[
        bool | None,
        typer.Option("--float16/--no-float16", help="Target cuda: float16 for what stays float (default: on)."),
    ] = None,
    compensation: Annotated[
        bool | None,
        typer.Option(
            "--compensation/--no-compensation", help="Ridge, GPTQ and bias refit, Linear by Linear (default: on)."
        ),
    ] = None,
    average_bits: Annotated[
        float | None,
        typer.Option("--average-bits", help="Allocate bits: weights and activations average no more, ends included."),
    ] = None,
    average_weight_bits: Annotated[
        float | None, typer.Option("--average-weight-bits", help="The same for weights alone.")
    ] = None,
    average_activation_bits: Annotated[
        float | None, typer.Option("--average-activation-bits", help="The same for activations alone.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option("--max-bytes", help="Allocate weight bits: the file takes no more, as in 12MB.")
    ] = None,
    max_bops: Annotated[
        float | None, typer.Option("--max-bops", help="Allocate bits: no more bit operations an image, as in 4e10.")
    ] = None,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(
            "--max-accuracy-drop",
            help="Allocate weight bits: the smallest file found that loses no more, as in 0.01, of top-1 on labelled "
            "calibration images, else of agreement with float.",
        ),
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option("--max-latency", help="Refused: bits do not change the speed of any target.")
    ] = None,
    allocator: Annotated[
        str | None,
        typer.Option(
            "--allocator", help="greedy, greedy-compensated, greedy-in-place or exact (needs scipy) (default: greedy)."
        ),
    ] = None,
    executor: Annotated[
        str, typer.Option("--executor", help="Where allocation measures: in-process, processes:N, dask://host:port.")
    ] = "in-process",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A file from which an interrupted allocation goes on.")
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
    if max_latency is not None:
        raise RecipeError(
            f"--max-latency {max_latency} cannot be kept by choosing bits: products run on 8-bit integers at every "
            "width, so bits change the size of the file, not its speed; choose --target cpu-native for speed"
        )
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
        "stream_exponents": stream_exponents,
        "target": target,
        "samples": samples,
        "seed": seed,
        "range_method": range_method,
        "rotation": rotation,
        "views": views,
        "smoothing": smoothing,
        "opt_m": opt_m,
        "attention_folds": attention_folds,
        "trellis": trellis,
        "reduce_range": reduce_range,
        "row_scale": row_scale,
        "gelu_folds": gelu_folds,
        "float16": float16,
        "compensation": compensation,
        "allocator": allocator,
    }
    limits: dict[str, float | None] = {
        "average_bits": average_bits,
        "average_weight_bits": average_weight_bits,
        "average_activation_bits": average_activation_bits,
        "max_bytes": parse_bytes(max_bytes, option="--max-bytes"),
        "max_bops": max_bops,
        "max_accuracy_drop": max_accuracy_drop,
    }
    budget = {name: limit for name, limit in limits.items() if limit is not None}
    with progress("compile") as report:
        result = api.compile(
            model,
            calibration,
            preset=preset,
            effort=effort,
            recipe=recipe,
            preprocess=preprocess,
            mean=parse_floats(mean, option="--mean"),
            std=parse_floats(std, option="--std"),
            convert_fp16=convert_fp16,
            options={**options, "budget": budget or None},
            executor=executor,
            checkpoint=checkpoint,
            verify=verify,
            report=report,
        )
    result.save(output, plan_out)
    typer.echo(f"wrote {output}: {model.stat().st_size / 1e6:.2f} MB -> {output.stat().st_size / 1e6:.2f} MB")
    if result.plan.path is not None:
        typer.echo(describe_point(path_points(result.plan)[-1]))
    typer.echo(result.report.summary())
    written = result.plan.recipe
    if written.reduce_range and written.weight_bits > REDUCED_BITS:
        typer.echo(
            f"weights, k and v of {written.weight_bits} bits are written with {REDUCED_BITS}, exact on processors "
            "without VNNI too (--full-range keeps 8)"
        )
    for refusal in result.plan.refusals:
        typer.echo(f"left alone: {refusal.what} at {refusal.site}: {refusal.reason}")
    if result.plan.recipe.target.is_native:
        echo_lowering(result.model)
