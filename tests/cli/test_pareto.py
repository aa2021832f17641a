"""`mptqc pareto` and the budget options, as far as they need no compile."""

import csv
import json

import pytest

from mptqc.cli.app import main
from mptqc.cli.options import parse_bytes
from mptqc.errors import RecipeError
from mptqc.plan import BitPath, QuantPlan, Step, save_plan
from mptqc.recipe import Loss, Recipe


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture
def plan(tmp_path):
    path = BitPath(
        variables=("a/weight", "a/input"),
        start=(8, 8),
        loss=0.1,
        accuracy=1.0,
        bytes=900,
        end_bytes=700,
        loss_kind=Loss.OUTPUT,
        steps=(Step(0, 6, None, None, 800), Step(1, 4, 0.3, 0.5, 700)),
    )
    made = QuantPlan(model_digest="0", recipe=Recipe(), elements={"a/weight": 100, "a/input": 10}, path=path)
    save_plan(made, tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_three_files_with_one_row_a_point(plan, tmp_path, capsys):
    assert not run("pareto", plan, "-o", tmp_path / "out")
    rows = json.loads((tmp_path / "out/pareto.json").read_text())
    assert [row["bytes"] for row in rows] == [900, 800, 700]
    with (tmp_path / "out/pareto.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["loss"] for row in table] == ["0.1", "", "0.3"]
    assert list(table[0]) == list(rows[0])
    assert (tmp_path / "out/pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "weights 6.000, activations 4.000; 700 bytes" in capsys.readouterr().out


def test_a_plan_without_a_search_is_refused(tmp_path, capsys):
    save_plan(QuantPlan(model_digest="0", recipe=Recipe()), tmp_path / "plan.json")
    assert run("pareto", tmp_path / "plan.json", "-o", tmp_path / "out") == 2
    assert "the plan has no path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_latency_is_refused_with_the_reason(tmp_path, capsys):
    arguments = ["compile", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--calibration", tmp_path]
    assert run(*arguments, "--max-latency", "5ms") == 2
    assert "products run on 8-bit integers at every width" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [("12MB", 12_000_000), ("11.5MiB", 12_058_624), ("800000", 800_000), ("3 kB", 3000), ("1G", 10**9)],
)
def test_sizes(text, count):
    assert parse_bytes(text, option="--max-bytes") == count


@pytest.mark.parametrize("text", ["", "twelve", "-3MB", "12 apples", "1e6"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="is no size"):
        parse_bytes(text, option="--max-bytes")
