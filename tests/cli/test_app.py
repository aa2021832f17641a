import logging
import subprocess
import sys
import time

import pytest

from mptqc import __version__
from mptqc.cli import app as app_module
from mptqc.cli.app import COMMANDS, main
from mptqc.cli.lazy_group import LazyCommand
from mptqc.errors import ModelError

MAX_START_SECONDS = 5.0
"""Importing torch or onnx takes longer than that under load; --help itself takes half a second."""

HEAVY_MODULES = ("numpy", "onnx", "onnxruntime", "torch")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def use_command(monkeypatch: pytest.MonkeyPatch, function) -> None:
    """Let `mptqc doctor` run `function`."""
    monkeypatch.setitem(COMMANDS, "doctor", LazyCommand(__name__, "stand_in", "Stand in."))
    monkeypatch.setattr(LazyCommand, "load", _load_of(function))


def _load_of(function):
    import typer

    def load(self, name):
        application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        application.command(name)(function)
        return typer.main.get_command(application)

    return load


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"mptqc {__version__}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_listed_help_is_the_commands_own(name: str):
    command = COMMANDS[name].load(name)
    assert (command.help or "").splitlines()[0] == COMMANDS[name].help


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom mptqc.cli.app import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY_MODULES} if name in sys.modules], file=sys.stderr)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert time.monotonic() - start < MAX_START_SECONDS


def test_user_error_is_one_paragraph_and_exit_code_2(monkeypatch, capsys):
    def fail() -> None:
        raise ModelError("first line\n  second line")

    use_command(monkeypatch, fail)
    assert run("doctor") == 2
    captured = capsys.readouterr()
    assert captured.err == "error: first line second line\n"
    assert captured.out == ""


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail() -> None:
        raise ZeroDivisionError

    use_command(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_interrupt_is_exit_code_130(monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    use_command(monkeypatch, interrupt)
    assert run("doctor") == 130


def test_unknown_command_is_exit_code_2(capsys):
    assert run("evalate") == 2
    assert "No such command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "level"),
    [((), logging.WARNING), (("-v",), logging.INFO), (("-vv",), logging.DEBUG), (("-q",), logging.ERROR)],
)
def test_log_level_follows_the_flags(monkeypatch, flags: tuple[str, ...], level: int):
    use_command(monkeypatch, lambda: None)
    assert run(*flags, "doctor") == 0
    assert logging.getLogger("mptqc").level == level


def test_console_script_is_the_entry_point():
    assert app_module.main is main
