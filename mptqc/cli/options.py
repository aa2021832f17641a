"""Options that several commands share, and how their text is read."""

import re
from typing import Annotated

import typer

from mptqc.errors import RecipeError

ProviderOption = Annotated[str, typer.Option("--provider", help="Where to run: cpu or cuda.")]
PreprocessOption = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        help="imagenet, inception, clip, none, or a JSON file: timm config, transformers preprocessor_config, or ours.",
    ),
]
MeanOption = Annotated[
    str | None, typer.Option("--mean", help="Subtracted from pixels in 0..1, as in 0.485,0.456,0.406.")
]
StdOption = Annotated[str | None, typer.Option("--std", help="Divides after the mean, as in 0.229,0.224,0.225.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def parse_bytes(text: str | None, *, option: str) -> int | None:
    """Read a size such as 12MB, 11.5MiB or 800000; None stays None.

    Raises:
        RecipeError: it is none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?)(i?)B?", text.strip())
    if found is None:
        raise RecipeError(f"{option} {text} is no size; write it as {option} 12MB, {option} 11.5MiB or in bytes")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** "_KMG".index(prefix.upper() or "_"))


def parse_floats(text: str | None, *, option: str) -> tuple[float, ...] | None:
    """Read numbers separated by commas; None stays None.

    Raises:
        RecipeError: a part is no number.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f"{option} {text} is not a list of numbers; write it as {option} 0.5,0.5,0.5.") from error


def parse_ints(text: str | None, *, option: str) -> tuple[int, ...] | None:
    """Read whole numbers separated by commas; None stays None.

    Raises:
        RecipeError: a part is no whole number.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f"{option} {text} is not a list of whole numbers; write it as {option} 3,224,224.") from error
