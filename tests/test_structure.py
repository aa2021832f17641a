"""The rules of the rooms (docs/architecture.md): who may import whom."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT = re.compile(r"^\s*(?:from|import)\s+(mptqc(?:\.\w+)*)", re.MULTILINE)
FORBIDDEN = {
    "passes": ("mptqc.analysis", "mptqc.runtime", "mptqc.compiler", "mptqc.cli", "mptqc.data"),
    "mptqc/analysis": ("mptqc.passes", "mptqc.compiler", "mptqc.cli"),
    "mptqc/graph": ("mptqc.passes", "mptqc.analysis", "mptqc.compiler", "mptqc.cli"),
    "mptqc/reference": ("mptqc.passes", "mptqc.analysis", "mptqc.graph", "mptqc.runtime", "mptqc.compiler"),
}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_does_not_import_those_that_stand_on_it(room):
    modules = sorted((ROOT / room).glob("*.py"))
    assert modules
    for module in modules:
        imported = IMPORT.findall(module.read_text(encoding="utf-8"))
        wrong = [name for name in imported if f"{name}.".startswith(tuple(f"{bad}." for bad in FORBIDDEN[room]))]
        assert not wrong, f"{module.relative_to(ROOT)} imports {wrong}"
