"""The one console on stderr that log lines and progress bars share, so that neither overwrites the other."""

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
"""Log level by how often --verbose was given."""

_console: Console | None = None


def stderr_console() -> Console:
    """Return the console on the present sys.stderr."""
    global _console
    if _console is None or _console.file is not sys.stderr:
        _console = Console(file=sys.stderr)
    return _console


def configure_logging(verbose: int, quiet: bool) -> None:
    """Send mptqc's log to stderr: errors only (quiet), else warnings, with --verbose info, with -vv debug too.

    On a terminal lines are coloured and wrapped; elsewhere each record is one plain line.
    """
    console = stderr_console()
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_path=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("mptqc")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.ERROR if quiet else LEVELS[min(verbose, len(LEVELS) - 1)])
