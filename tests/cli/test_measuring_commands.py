"""evaluate, benchmark and doctor, from the command line to the output."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from mptqc.cli.app import main
from mptqc.data.preprocess import METADATA_KEY, Preprocessing

SIDE = 4
CLASSES = 5
HALF = Preprocessing(mean=(0.5,), std=(0.5,))


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    code = caught.value.code
    assert isinstance(code, int)
    return code


def classifier(path: Path, *, noise: float = 0.0, preprocessing: Preprocessing | None = None, batch="batch") -> Path:
    features = 3 * SIDE * SIDE
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(features, CLASSES)) + noise * generator.normal(size=(features, CLASSES))
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if preprocessing is not None:
        helper.set_model_props(model, {METADATA_KEY: preprocessing.to_json()})
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return classifier(tmp_path / "model.onnx")


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (12, 3, SIDE, SIDE)).astype(np.uint8)


@pytest.fixture
def data(tmp_path: Path, pixels: np.ndarray) -> Path:
    """Labelled by the model itself under mean and std 0.5, so that its top1 is 1 with them."""
    weight = numpy_helper.to_array(onnx.load(classifier(tmp_path / "labeller.onnx")).graph.initializer[0])
    logits = HALF.normalize(pixels).reshape(len(pixels), -1) @ weight
    np.savez(tmp_path / "data.npz", images=pixels, labels=logits.argmax(1))
    return tmp_path / "data.npz"


def test_evaluate_json(model: Path, data: Path, tmp_path: Path, capsys):
    other = classifier(tmp_path / "other.onnx", noise=0.3)
    flags = ("--mean", "0.5", "--std", "0.5", "--json")
    assert run("evaluate", other, "--data", data, "--reference", model, *flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["top1", "top5", "agreement", "sqnr_db", "images"]
    assert result["images"] == 12
    assert result["top1"] == result["agreement"] < 1
    assert result["top5"] == 1.0
    assert 0 < result["sqnr_db"] < 30


def test_evaluate_table(model: Path, data: Path, capsys):
    assert run("evaluate", model, "--data", data, "--mean", "0.5", "--std", "0.5") == 0
    out = capsys.readouterr().out
    assert "top1       100.00%" in out
    assert "sqnr_db    -" in out
    assert "agreement and sqnr_db want --reference" in out
    assert "top1 and top5 want" not in out


def test_evaluate_with_another_model_as_reference(model: Path, data: Path, tmp_path: Path, capsys):
    other = classifier(tmp_path / "other.onnx", noise=3)
    assert run("evaluate", other, "--data", data, "--reference", model, "--mean", "0.5", "--std", "0.5") == 0
    assert "is --reference the float model" in capsys.readouterr().out


def test_evaluate_uses_the_stored_preprocessing(tmp_path: Path, data: Path, capsys):
    stored = classifier(tmp_path / "stored.onnx", preprocessing=HALF)
    assert run("evaluate", stored, "--data", data, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["top1"] == 1.0
    assert captured.err == ""


def test_evaluate_flag_overrides_with_a_warning(tmp_path: Path, data: Path, capsys):
    stored = classifier(tmp_path / "stored.onnx", preprocessing=HALF)
    assert run("evaluate", stored, "--data", data, "--preprocess", "imagenet", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["top1"] < 1.0
    assert "override the preprocessing stored in the model" in captured.err


def test_evaluate_folder(tmp_path: Path, model: Path, pixels: np.ndarray, capsys):
    for k, picture in enumerate(pixels):
        folder = tmp_path / "photos" / str(k % CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{k}.png")
    flags = ("--preprocess", "none", "--limit", "7", "--json")
    assert run("evaluate", model, "--data", tmp_path / "photos", *flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 7
    assert result["top1"] is not None


def test_evaluate_without_preprocessing_says_which_flag(model: Path, data: Path, capsys):
    assert run("evaluate", model, "--data", data) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--preprocess" in error


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--batch", "0"), "batch is 0"),
        (("--limit", "0"), "positive"),
        (("--threads", "-1"), "threads is -1"),
        (("--mean", "a,b"), "--mean a,b is not a list of numbers"),
        (("--provider", "rocm"), "unknown provider 'rocm'"),
        (("--provider", "tensorrt"), "refused"),
        (("--preprocess", "imagnet"), "neither a preset"),
        (("--reference", "nowhere.onnx"), "nowhere.onnx does not exist"),
    ],
)
def test_evaluate_wrong_option(model: Path, data: Path, flags: tuple[str, ...], problem: str, capsys):
    assert run("evaluate", model, "--data", data, "--std", "0.5", *flags) == 2
    assert problem in capsys.readouterr().err


def test_evaluate_truncated_model(model: Path, data: Path, capsys):
    model.write_bytes(model.read_bytes()[:100])
    assert run("evaluate", model, "--data", data) == 2
    assert "truncated" in capsys.readouterr().err


def test_benchmark_json(model: Path, tmp_path: Path, capsys):
    second = classifier(tmp_path / "second.onnx")
    assert run("benchmark", model, second, "--repeats", "3", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["machine", "rows"]
    first, other = result["rows"]
    assert list(first) == [
        "model",
        "median_ms",
        "p10_ms",
        "p90_ms",
        "speedup",
        "file_bytes",
        "integer_matmuls",
        "float_matmuls",
        "fused_ops",
        "batch",
        "threads",
        "provider",
        "rounds",
        "clock",
    ]
    assert (first["speedup"], first["rounds"], first["float_matmuls"]) == (1.0, 3, 1)
    assert first["file_bytes"] == model.stat().st_size
    assert other["model"] == str(second)


def test_benchmark_table(model: Path, capsys):
    assert run("benchmark", model, "--repeats", "2", "--batch", "4") == 0
    out = capsys.readouterr().out
    assert "model.onnx" in out
    assert "1.00 x" in out
    assert "batch 4, 1 thread(s), cpu, 2 rounds, cpu time" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--batch", "0"), "batch is 0"),
        (("--shape", "3;4"), "--shape 3;4 is not a list of whole numbers"),
        (("--shape", "1,4,4"), "does not fit --shape 1,4,4"),
        (("--provider", "gpu"), "unknown provider 'gpu'"),
        (("--seconds", "-1"), "min_seconds is -1"),
    ],
)
def test_benchmark_wrong_option(model: Path, flags: tuple[str, ...], problem: str, capsys):
    assert run("benchmark", model, *flags) == 2
    assert problem in capsys.readouterr().err


def test_benchmark_missing_file(model: Path, tmp_path: Path, capsys):
    assert run("benchmark", model, tmp_path / "nowhere.onnx") == 2
    assert "nowhere.onnx" in capsys.readouterr().err


def test_verbose_prints_the_session_options(model: Path, capsys):
    assert run("--verbose", "benchmark", model, "--repeats", "1") == 0
    assert "session.qdq_matmulnbits_accuracy_level=0" in capsys.readouterr().err


def test_doctor_json(capsys):
    assert run("doctor", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["packages"]["onnx"] == onnx.__version__
    assert result["providers"]["cpu"] == {"built_in": True, "starts": True, "reason": None}
    assert set(result["providers"]) == {"cpu", "cuda"}
    assert result["kernel_library"]


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert run("doctor", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert not result["providers"]["cuda"]["starts"]
    assert any("onnxruntime-gpu" in item["how"] for item in result["missing"])


def test_doctor_tables(capsys):
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert "kernel library" in out
    assert "provider cpu" in out
