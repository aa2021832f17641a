"""Every bad input ends in one clear paragraph, exit code 2 and no output file."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from PIL import Image

from mptqc.cli.app import main
from mptqc.graph.io import load_model, serialize

ZOO = Path(__file__).parents[2] / "zoo"
VIT = ZOO / "vit.onnx"
INPUT = "float[n,1,28,28] images"


@dataclass(frozen=True)
class Call:
    """One call of `mptqc compile`; what a test spoils is replaced."""

    folder: Path
    model: Path = VIT
    calibration: Path = ZOO / "calibration.npz"
    options: tuple[str, ...] = ("--preset", "w4a4", "--preprocess", str(ZOO / "preprocess.json"))
    output: str = "out.onnx"

    def arguments(self) -> list[str]:
        """The command line."""
        named = ["-o", str(self.folder / self.output), "--calibration", str(self.calibration)]
        return ["--quiet", "compile", str(self.model), *named, *self.options]


Spoil = Callable[[Call], Call]


def file(call: Call, name: str, content: bytes) -> Path:
    path = call.folder / name
    path.write_bytes(content)
    return path


def text_model(call: Call, body: str, opset: int = 20, imports: str = "") -> Call:
    header = f'<ir_version: 10, opset_import: ["" : {opset}{imports}]>\n'
    return replace(call, model=file(call, "model.onnx", serialize(ir.from_onnx_text(header + body))))


def external(call: Call, location: str) -> Call:
    proto = onnx.load(VIT)
    onnx.external_data_helper.convert_model_to_external_data(proto, location=location, size_threshold=0)
    path = call.folder / "model.onnx"
    onnx.save(proto, path)
    return replace(call, model=path)


def missing_external_data(call: Call) -> Call:
    spoiled = external(call, "weights.data")
    (call.folder / "weights.data").unlink()
    return spoiled


def external_data_outside(call: Call) -> Call:
    spoiled = external(call, "weights.data")
    proto = onnx.load(spoiled.model, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.data"
    spoiled.model.write_bytes(proto.SerializeToString())
    return spoiled


def constant(kind: str, size: int) -> str:
    return f"{kind} = {{{', '.join(f'0.{k % 9 + 1}' for k in range(size))}}}"


def without_attention(call: Call) -> Call:
    body = (
        f"g ({INPUT}) => (float[n,1,28,10] logits) <{constant('float[28,10] w', 280)}, {constant('float[10] b', 10)}> "
        "{ product = MatMul(images, w) logits = Add(product, b) }"
    )
    return text_model(call, body)


def convolutional(call: Call) -> Call:
    body = (
        f"g ({INPUT}) => (float[n,2,26,26] logits) <{constant('float[2,1,3,3] w', 18)}> "
        "{ map = Conv(images, w) logits = Relu(map) }"
    )
    return text_model(call, body)


def half_precision(call: Call) -> Call:
    body = "g (float16[n,1,28,28] images) => (float16[n,1,28,28] logits) { logits = Softmax(images) }"
    return text_model(call, body)


def quantized(call: Call) -> Call:
    body = (
        f"g ({INPUT}) => (float[n,1,28,28] logits) <float s = {{0.1}}, uint8 z = {{128}}> "
        "{ q = QuantizeLinear(images, s, z) logits = DequantizeLinear(q, s, z) }"
    )
    return text_model(call, body)


def compiled_already(call: Call) -> Call:
    model = load_model(VIT)
    model.metadata_props["mptqc.stage"] = "quantized"
    return replace(call, model=file(call, "model.onnx", serialize(model)))


def foreign_op(call: Call) -> Call:
    body = f"g ({INPUT}) => (float[n,1,28,28] logits) {{ logits = acme.Swirl(images) }}"
    return text_model(call, body, imports=', "acme" : 1')


def old_opset(call: Call) -> Call:
    return text_model(call, f"g ({INPUT}) => (float[n,1,28,28] logits) {{ logits = Relu(images) }}", opset=11)


def pictures(call: Call, **images: np.ndarray) -> Call:
    folder = call.folder / "pictures"
    folder.mkdir()
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return replace(call, calibration=folder)


def unreadable_picture(call: Call) -> Call:
    spoiled = pictures(call, good=np.arange(784, dtype=np.uint8).reshape(28, 28))
    (spoiled.calibration / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    return spoiled


def arrays(call: Call, name: str = "images", **changes: object) -> Call:
    images = np.random.default_rng(0).normal(size=changes.pop("shape", (4, 1, 28, 28))).astype(np.float32)
    if "value" in changes:
        images[1] = changes["value"]
    path = call.folder / "images.npz"
    np.savez(path, **{name: images})
    return replace(call, calibration=path)


def with_options(*options: str) -> Spoil:
    return lambda call: replace(call, options=(*call.options, *options))


def with_recipe(text: str) -> Spoil:
    def spoil(call: Call) -> Call:
        path = call.folder / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return replace(call, options=(*call.options, "--recipe", str(path)))

    return spoil


# What is wrong: how to make it so, and words that the paragraph must hold (what was wrong; what to do or is known).
CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "no such file": (lambda call: replace(call, model=call.folder / "none.onnx"), ("none.onnx", "does not exist")),
    "not ONNX": (lambda call: replace(call, model=file(call, "m.onnx", b"not a model at all")), ("not an ONNX",)),
    "empty file": (lambda call: replace(call, model=file(call, "m.onnx", b"")), ("empty", "export")),
    "truncated": (
        lambda call: replace(call, model=file(call, "m.onnx", VIT.read_bytes()[:100_000])),
        ("truncated", "again"),
    ),
    "missing external data": (missing_external_data, ("weights.data", "missing", "copy")),
    "external data outside": (external_data_outside, ("outside", "folder")),
    "no attention": (without_attention, ("no transformer block", "looked for softmax")),
    "convolutional": (convolutional, ("no transformer block", "convolution", "CNN")),
    "half precision": (half_precision, ("FLOAT16", "--convert-fp16")),
    "quantized": (quantized, ("already quantized", "QuantizeLinear", "float model")),
    "compiled already": (compiled_already, ("already compiled", "float model")),
    "foreign op": (foreign_op, ("acme::Swirl",)),
    "old opset": (old_opset, ("opset 11", "13")),
    "empty folder": (pictures, ("pictures",)),
    "unreadable picture": (unreadable_picture, ("torn.png",)),
    "no calibration": (lambda call: replace(call, calibration=call.folder / "none"), ("none", "does not exist")),
    "wrong channels": (lambda call: arrays(call, shape=(4, 3, 28, 28)), ("3", "28")),
    "wrong size": (lambda call: arrays(call, shape=(4, 1, 32, 32)), ("32", "28")),
    "NaN": (lambda call: arrays(call, value=np.nan), ("NaN", "1")),
    "infinite": (lambda call: arrays(call, value=np.inf), ("infinite", "1")),
    "constant": (lambda call: arrays(call, value=0.5), ("constant", "remove")),
    "npz without the input": (lambda call: arrays(call, name="pixels"), ("pixels", "images")),
    "one weight bit": (with_options("--weight-bits", "1"), ("weight_bits", "2")),
    "nine activation bits": (with_options("--activation-bits", "9"), ("activation_bits", "8")),
    "unknown preset": (lambda call: replace(call, options=("--preset", "w1a1")), ("w1a1", "w4a4")),
    "unknown key": (with_recipe("weightbits = 4"), ("weightbits", "weight_bits")),
    "unknown site": (with_recipe("[sites]\n'block99.fc1' = { weight_bits = 8 }"), ("block99.fc1", "block00.fc1")),
    "not TOML": (with_recipe("weight_bits: 4"), ("not TOML",)),
    "unknown target": (with_options("--target", "toaster"), ("toaster", "portable")),
    "no folder": (lambda call: replace(call, output="none/out.onnx"), ("out.onnx", "cannot be written")),
    "onto a folder": (lambda call: replace(call, output="."), ("is a folder",)),
    "unknown preprocessing": (with_options("--preprocess", "imagent"), ("imagent", "imagenet")),
}


@pytest.mark.parametrize("name", CASES)
def test_compile_refuses(tmp_path, capsys, name):
    spoil, words = CASES[name]
    call = spoil(Call(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert refusal(call.arguments(), capsys, words)
    assert sorted(tmp_path.rglob("*")) == before


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> bool:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    assert ended.value.code == 2, captured.err
    paragraph = captured.err.strip()
    assert paragraph.startswith("error: ")
    assert "\n" not in paragraph
    assert "Traceback" not in paragraph
    assert [word for word in words if word.lower() not in paragraph.lower()] == [], paragraph
    return True


def test_plan_of_another_model_is_refused(compile_zoo, tmp_path, capsys):
    model = load_model(VIT)
    model.doc_string = "not the same file"
    (tmp_path / "other.onnx").write_bytes(serialize(model))
    plan = tmp_path / "plan.json"
    file = compile_zoo("vit", "w8a8", **compile_zoo.quick)
    file.save_plan(plan)
    arguments = ["apply", str(tmp_path / "other.onnx"), str(plan), "-o", str(tmp_path / "out.onnx")]
    assert refusal(arguments, capsys, ("another model", "digest"))
    assert not (tmp_path / "out.onnx").exists()


def test_damaged_plan_is_refused(tmp_path, capsys):
    (tmp_path / "plan.json").write_text("{", encoding="utf-8")
    arguments = ["apply", str(VIT), str(tmp_path / "plan.json"), "-o", str(tmp_path / "out.onnx")]
    assert refusal(arguments, capsys, ("plan.json",))
    assert not (tmp_path / "out.onnx").exists()


def test_missing_provider_is_never_replaced(capsys):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and shutil.which("nvidia-smi"):
        pytest.skip("this machine may have the provider")
    assert refusal(["benchmark", str(VIT), "--provider", "cuda"], capsys, ("cuda", "--provider cpu"))


def test_missing_argument_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compile", str(VIT)])
    assert ended.value.code == 2
    assert "--output" in capsys.readouterr().err
