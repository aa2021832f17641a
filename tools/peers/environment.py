"""Environments of their own, for tools whose requirements must not mix with ours."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mptqc.errors import MptqcError

INSTALLED = "installed.txt"
"""Written last into an environment: the Python and the requirements that it was made of."""

QUOTED_LINES = 5  # of what a failed command printed, in the error


class PeerError(MptqcError):
    """A peer cannot be installed, or failed."""


def ensure_environment(folder: Path, requirements: Path) -> Path:
    """Return the Python of the environment in `folder`; make it first, unless it is there, whole and of the same pins.

    Args:
        folder: of the environment. What an older environment left there is removed; anything else is refused.
        requirements: exact versions, a file as pip reads it.

    Raises:
        PeerError: pip cannot install the requirements here, or `folder` holds something else.
    """
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = f"# Python {version}\n{requirements.read_text(encoding='utf-8')}"
    installed = folder / INSTALLED
    if installed.exists() and installed.read_text(encoding="utf-8") == wanted:
        return python
    if folder.is_file() or (folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir())):
        raise PeerError(f"{folder} holds something else than a Python environment; name another folder for one.")
    failure = (
        f"the environment {folder} for {requirements.name} cannot be made; it takes a package index and a Python that "
        f"these versions are published for, and this is Python {version}"
    )
    run([sys.executable, "-m", "venv", "--clear", str(folder)], failure)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"]
    run([*install, str(requirements)], failure)
    installed.write_text(wanted, encoding="utf-8")
    return python


def run(command: Sequence[str], failure: str, variables: Mapping[str, str] | None = None) -> None:
    """Run a command in silence, with some environment variables besides ours.

    Raises:
        PeerError: it failed; `failure` and the last lines that it printed.
    """
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **(variables or {})},
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise PeerError(f"{failure}: {' | '.join(lines[-QUOTED_LINES:]) or f'exit status {done.returncode}'}")
