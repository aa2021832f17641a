"""Progress bars for long work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mptqc.cli.console import stderr_console

ProgressCall = Callable[[str, int, int], None]
"""Takes the step's name, how much of it is done, and its total."""

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Let `--quiet` silence every progress bar of this process."""
    global _quiet
    _quiet = quiet


@contextmanager
def progress(description: str, *, quiet: bool = False) -> Iterator[ProgressCall]:
    """Show one bar on stderr: the step's name, done of total, and the time left in the step.

    The yielded call starts a new bar, with a clock of its own, whenever the step's name changes. Nothing is shown when
    stderr is no terminal, after `set_quiet(True)`, or if `quiet`. The bar vanishes at the end.
    """
    console = stderr_console()
    if quiet or _quiet or not console.is_terminal:
        yield _ignore
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(description, total=None)
        step: str | None = None

        def report(name: str, done: int, total: int) -> None:
            nonlocal step
            if name != step:
                step = name
                bars.reset(task, total=total, description=f"{description}: {name}")
            bars.update(task, completed=done, total=total)

        yield report


def _ignore(name: str, done: int, total: int) -> None:
    """Show nothing."""
