"""The entry point `mptqc`: global options, the table of commands, and how errors leave the process.

Exit codes: 0 done; 2 something the user can mend (one paragraph on stderr, no traceback); 130 interrupted. Anything
else is a bug in mptqc and keeps its traceback, with exit code 1.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mptqc import __version__
from mptqc.cli.console import configure_logging
from mptqc.cli.lazy_group import LazyCommand, lazy_group
from mptqc.cli.progress import set_quiet
from mptqc.errors import MptqcError

USER_ERROR = 2
INTERRUPTED = 130

COMMANDS = {
    "export": LazyCommand(
        "mptqc.cli.export",
        "export",
        "Export a timm or transformers vision transformer to float ONNX, its preprocessing in the file's metadata.",
    ),
    "compile": LazyCommand(
        "mptqc.cli.compile", "compile", "Compile a float ONNX vision transformer into one that runs in integers."
    ),
    "apply": LazyCommand(
        "mptqc.cli.apply",
        "apply",
        "Rebuild a compiled model from a plan, with no data, byte for byte; or another point of its path (--at).",
    ),
    "pareto": LazyCommand(
        "mptqc.cli.pareto",
        "pareto",
        "Write the accuracy/size curve that a search for bits passed; `mptqc apply --at` emits any point of it.",
    ),
    "lower": LazyCommand(
        "mptqc.cli.lower", "lower", "Rewrite a compiled portable file with faster operators, without the float model."
    ),
    "inspect": LazyCommand(
        "mptqc.cli.inspect", "inspect", "Show what a compiled model holds: per layer bits, scales, smoothing, bytes."
    ),
    "evaluate": LazyCommand(
        "mptqc.cli.evaluate", "evaluate", "Measure accuracy on labelled images, and nearness to a float reference."
    ),
    "benchmark": LazyCommand(
        "mptqc.cli.benchmark", "benchmark", "Time models side by side and count the operators that really run."
    ),
    "doctor": LazyCommand(
        "mptqc.cli.doctor", "doctor", "Say what this machine can run, what is missing, and how to get it."
    ),
}

app = typer.Typer(
    name="mptqc",
    cls=lazy_group(COMMANDS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mptqc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, help="Log each step and the session options; -vv logs each edit."),
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile float ONNX vision transformers to low-bit integer models for ONNX Runtime."""
    configure_logging(verbose, quiet)
    set_quiet(quiet)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (sys.argv by default) and leave by SystemExit."""
    try:
        app(args=None if arguments is None else list(arguments))
    except MptqcError as error:
        paragraph = " ".join(str(error).split())
        sys.stderr.write(f"error: {paragraph}\n")
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
