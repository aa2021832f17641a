import io

import pytest
from rich.console import Console

from mptqc.cli import progress as progress_module
from mptqc.cli.progress import progress, set_quiet


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    monkeypatch.setattr(progress_module, "stderr_console", lambda: console)
    return written


def test_step_and_count_are_shown(terminal: io.StringIO):
    with progress("compile") as report:
        report("observe", 1, 4)
        report("search", 2, 9)
    assert "compile: search" in terminal.getvalue()
    assert "2/9" in terminal.getvalue()


def test_quiet_shows_nothing(terminal: io.StringIO):
    with progress("compile", quiet=True) as report:
        report("observe", 1, 4)
    assert terminal.getvalue() == ""


def test_global_quiet_shows_nothing(terminal: io.StringIO):
    set_quiet(True)
    try:
        with progress("compile") as report:
            report("observe", 1, 4)
    finally:
        set_quiet(False)
    assert terminal.getvalue() == ""


def test_no_terminal_shows_nothing(capsys: pytest.CaptureFixture[str]):
    with progress("compile") as report:
        report("observe", 1, 4)
    assert capsys.readouterr() == ("", "")
