from pathlib import Path

import onnx
import pytest
import typer
from typer.testing import CliRunner

from mptqc.cli.export import export
from mptqc.errors import ModelError, RecipeError

pytest.importorskip("torch")
pytest.importorskip("huggingface_hub")

application = typer.Typer()
application.command()(export)


def test_random_model_is_written(tmp_path: Path) -> None:
    output = tmp_path / "m.onnx"
    arguments = ["vit_tiny_patch16_224", "--random", "-o", str(output), "--image-size", "32", "--batch", "2"]
    result = CliRunner().invoke(application, [*arguments, "--exporter", "torchscript", "--opset", "14"])
    assert result.exit_code == 0, result.output
    assert result.output == f"wrote {output}\n"
    model = onnx.load(output)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 32, 32]
    assert model.opset_import[0].version == 14


def test_unknown_exporter_is_refused(tmp_path: Path) -> None:
    arguments = ["vit_tiny_patch16_224", "-o", str(tmp_path / "m.onnx"), "--exporter", "onnxscript"]
    assert CliRunner().invoke(application, arguments).exit_code == 2


def test_error_reaches_the_caller(tmp_path: Path) -> None:
    result = CliRunner().invoke(application, ["resnet50", "--random", "-o", str(tmp_path / "m.onnx")])
    assert isinstance(result.exception, ModelError)


def test_timm_options_are_refused_for_transformers(tmp_path: Path) -> None:
    arguments = ["google/vit-base-patch16-224", "-o", str(tmp_path / "m.onnx"), "--image-size", "32"]
    assert isinstance(CliRunner().invoke(application, arguments).exception, RecipeError)
