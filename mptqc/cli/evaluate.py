"""`mptqc evaluate`: accuracy on labelled images, and nearness to a float reference."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mptqc.cli.options import JsonOption, MeanOption, PreprocessOption, ProviderOption, StdOption, parse_floats
from mptqc.cli.progress import progress
from mptqc.data.load import load_samples
from mptqc.data.preprocess_sources import choose_preprocessing
from mptqc.runtime import evaluate as runtime
from mptqc.runtime.model_io import image_input, metadata
from mptqc.runtime.session import create_session

UNRELATED_DB = 1.0
"""Below it the error is as large as the outputs themselves; compiled models have 10 dB and more."""


def evaluate(
    model: Annotated[Path, typer.Argument(help="The ONNX model.")],
    data: Annotated[Path, typer.Option("--data", help="A folder of images (sub-folders are labels), .npz or .npy.")],
    reference: Annotated[Path | None, typer.Option("--reference", help="The float model to compare with.")] = None,
    preprocess: PreprocessOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    batch: Annotated[int, typer.Option("--batch", help="Images a run.")] = 8,
    threads: Annotated[int, typer.Option("--threads", help="0 takes every core.")] = 0,
    provider: ProviderOption = "cpu",
    limit: Annotated[int | None, typer.Option("--limit", help="Use at most this many images.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw that --limit makes.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy on labelled images, and nearness to a float reference.

    The preprocessing is the one stored in the model, unless a flag says otherwise.

    JSON keys: top1, top5, agreement (fractions), sqnr_db, images; null where a figure is not defined.
    """
    session = create_session(model, provider=provider, threads=threads)
    value = image_input(session)
    preprocessing = choose_preprocessing(
        source=preprocess,
        mean=parse_floats(mean, option="--mean"),
        std=parse_floats(std, option="--std"),
        metadata=metadata(session),
        image_size=value.image_size,
    )
    samples = load_samples(
        data, input_name=value.name, input_shape=value.shape, preprocessing=preprocessing, limit=limit, seed=seed
    )
    with progress("evaluate") as report:
        result = runtime.evaluate(
            session,
            samples,
            reference=reference,
            provider=provider,
            threads=threads,
            batch=batch,
            progress=report,
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
    else:
        _print_table(result)
        for hint in _hints(result, with_reference=reference is not None):
            typer.echo(hint)


def _hints(result: runtime.Evaluation, *, with_reference: bool) -> list[str]:
    """What to do about figures that are absent or mean nothing."""
    hints = []
    if result.top1 is None:
        hints.append("top1 and top5 want logits [N, classes] and labels: sub-folders of --data, or labels in the .npz")
    if not with_reference:
        hints.append("agreement and sqnr_db want --reference, the float model that this one was compiled from")
    elif result.sqnr_db is not None and result.sqnr_db < UNRELATED_DB:
        hints.append(
            "the outputs are as far from the reference's as those of another model: is --reference the float model "
            "that this one was compiled from?"
        )
    return hints


def _print_table(result: runtime.Evaluation) -> None:
    table = Table("figure", "value", box=None, pad_edge=False)
    for name in ("top1", "top5", "agreement"):
        share = getattr(result, name)
        table.add_row(name, "-" if share is None else f"{share:.2%}")
    table.add_row("sqnr_db", "-" if result.sqnr_db is None else f"{result.sqnr_db:.2f}")
    table.add_row("images", str(result.images))
    Console().print(table)
