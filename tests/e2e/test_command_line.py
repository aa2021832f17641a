"""The commands of the README, one after the other, on the zoo."""

import json
from pathlib import Path

import pytest

from mptqc.cli.app import main

ZOO = Path(__file__).parents[2] / "zoo"
EVALUATION_KEYS = {"top1", "top5", "agreement", "sqnr_db", "images"}
# The promise of W4A4 is 2 points of top-1 lost; 500 of the 2,000 images leave a standard error of 1.4 points more.
LEAST_TOP1 = 0.89 - 0.02 - 2 * 0.014


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the model and plan that `mptqc compile` wrote."""
    made = tmp_path_factory.mktemp("command-line")
    options = ["--preset", "w4a4", "--samples", "32", "--preprocess", ZOO / "preprocess.json"]
    files = ["-o", made / "out.onnx", "--plan-out", made / "plan.json"]
    run("compile", ZOO / "vit.onnx", "--calibration", ZOO / "calibration.npz", *options, *files)
    return made


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--quiet", *(str(argument) for argument in arguments)])
    assert not ended.value.code


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    """What a command prints with --json, which is all that it prints."""
    capsys.readouterr()
    run(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def test_compile_writes_the_model_and_the_plan(folder):
    assert {path.name for path in folder.iterdir()} == {"out.onnx", "plan.json", "plan.safetensors"}


def test_apply_writes_the_same_bytes(folder, tmp_path):
    run("apply", ZOO / "vit.onnx", folder / "plan.json", "-o", tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx").read_bytes() == (folder / "out.onnx").read_bytes()


def test_evaluate_takes_the_preprocessing_from_the_model(folder, capsys):
    figures = answer(
        capsys, "evaluate", folder / "out.onnx", "--data", ZOO / "test.npz", "--reference", ZOO / "vit.onnx",
        "--limit", 500,
    )  # fmt: skip
    assert set(figures) == EVALUATION_KEYS
    assert figures["images"] == 500
    assert figures["top1"] > LEAST_TOP1
    assert figures["top1"] <= figures["top5"] <= 1


def test_benchmark_counts_what_runs(folder, capsys):
    answered = answer(capsys, "benchmark", ZOO / "vit.onnx", folder / "out.onnx", "--repeats", 3)
    floating, integer = answered["rows"]
    assert floating["speedup"] == 1
    assert integer["float_matmuls"] == 0 < integer["integer_matmuls"]
    assert integer["file_bytes"] == (folder / "out.onnx").stat().st_size


def test_inspect_names_every_layer(folder, capsys):
    answered = answer(capsys, "inspect", folder / "out.onnx")
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert {layer["site"] for layer in plan["layers"]} <= {layer["site"] for layer in answered["layers"]}


def test_doctor_names_the_runtime(capsys):
    assert answer(capsys, "doctor")["onnxruntime_flavour"].startswith("onnxruntime")
