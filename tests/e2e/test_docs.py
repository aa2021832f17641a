"""What the documentation shows works as it stands there."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from mptqc.analysis.inspect import Inspection, OperandRow, Totals
from mptqc.recipe import make_recipe
from mptqc.runtime.benchmark import BenchmarkRow
from mptqc.runtime.diagnosis import Diagnosis, Missing, ProviderState
from mptqc.runtime.evaluate import Evaluation

ROOT = Path(__file__).parents[2]
REGISTER = """
import importlib.util, pathlib, sys
source = pathlib.Path(__file__).parent / "fold_factor.py"
spec = importlib.util.spec_from_file_location("mptqc.passes.fold_factor", source)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
"""


def test_the_example_pass_of_the_architecture_passes_its_tests(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.DOTALL)
    source, tests = blocks
    (tmp_path / "fold_factor.py").write_text(source, encoding="utf-8")
    (tmp_path / "test_fold_factor.py").write_text(tests, encoding="utf-8")
    fixtures = (ROOT / "tests/passes/conftest.py").read_text(encoding="utf-8")
    (tmp_path / "conftest.py").write_text(fixtures + REGISTER, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 passed" in ran.stdout


def test_the_recipe_of_the_readme_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    recipe = make_recipe("w8a8", tmp_path / "recipe.toml")
    assert recipe.bits_of("block01.fc1") == (4, 6)
    assert recipe.bits_of("block01.fc2") == (4, 8)


@pytest.mark.parametrize(
    "answer", [Evaluation, BenchmarkRow, Inspection, OperandRow, Totals, Diagnosis, ProviderState, Missing]
)
def test_every_json_key_is_documented(answer):
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs/json.md").read_text(encoding="utf-8")))
    assert {field.name for field in fields(answer)} - documented == set()
