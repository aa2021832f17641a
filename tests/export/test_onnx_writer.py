from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from mptqc.errors import ModelError, OutputError  # noqa: E402 - after importorskip
from mptqc.export.onnx_writer import Exporter, OnnxForm, export_module  # noqa: E402
from mptqc.runtime.session import create_session  # noqa: E402

SHAPE = (3, 8)
EXPORTERS: list[Exporter] = ["dynamo", "torchscript"]
# float32, sums of 8 products near 1: some roundings of 2^-24 each, far below one part in a hundred thousand
FLOAT_TOLERANCE = 1e-5


class Tiny(torch.nn.Module):  # type: ignore[misc]  # torch is imported by name
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(8)
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, images: "torch.Tensor") -> "torch.Tensor":
        return torch.nn.functional.gelu(self.linear(self.norm(images)))


class Untranslatable(torch.nn.Module):  # type: ignore[misc]  # torch is imported by name
    def forward(self, images: "torch.Tensor") -> "torch.Tensor":
        return torch.special.bessel_j0(images)


def batch_dimension(path: Path) -> str | int:
    dimension = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0]
    return dimension.dim_param or dimension.dim_value


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_dynamic_batch_gives_the_outputs_of_torch(tmp_path: Path, exporter: Exporter) -> None:
    module = Tiny()
    export_module(module, SHAPE, tmp_path / "m.onnx", OnnxForm(exporter), {})
    session = create_session(tmp_path / "m.onnx", threads=1)
    for batch in (1, 5):
        images = torch.randn((batch, *SHAPE))
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        expected = module(images).detach().numpy()
        np.testing.assert_allclose(logits, expected, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(("batch", "written"), [(None, "batch"), (1, 1), (3, 3)])
def test_batch_is_written(tmp_path: Path, exporter: Exporter, batch: int | None, written: str | int) -> None:
    export_module(Tiny(), SHAPE, tmp_path / "m.onnx", OnnxForm(exporter, batch=batch), {})
    assert batch_dimension(tmp_path / "m.onnx") == written


@pytest.mark.parametrize(
    ("form", "operators"),
    [
        (OnnxForm("dynamo", 20), {"LayerNormalization", "Gelu"}),
        (OnnxForm("torchscript", 17), {"LayerNormalization", "Erf"}),
        (OnnxForm("torchscript", 14), {"ReduceMean", "Erf"}),
    ],
)
def test_opset_decides_how_norm_and_gelu_are_written(tmp_path: Path, form: OnnxForm, operators: set[str]) -> None:
    export_module(Tiny(), SHAPE, tmp_path / "m.onnx", form, {})
    model = onnx.load(tmp_path / "m.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [form.resolved_opset]
    composite = {"LayerNormalization", "Gelu", "ReduceMean", "Erf"}
    assert {node.op_type for node in model.graph.node} & composite == operators


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_metadata_is_written_and_paths_are_not(tmp_path: Path, exporter: Exporter) -> None:
    export_module(Tiny(), SHAPE, tmp_path / "m.onnx", OnnxForm(exporter), {"key": "value"})
    model = onnx.load(tmp_path / "m.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props} == {"key": "value"}
    assert str(Path(__file__).parent).encode() not in (tmp_path / "m.onnx").read_bytes()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_second_export_has_the_same_bytes(tmp_path: Path, exporter: Exporter) -> None:
    for name in ("a.onnx", "b.onnx"):
        export_module(Tiny(), SHAPE, tmp_path / name, OnnxForm(exporter), {})
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_failed_export_leaves_the_old_file(tmp_path: Path, exporter: Exporter) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(ModelError, match=f"{exporter} exporter cannot translate Untranslatable"):
        export_module(Untranslatable(), SHAPE, tmp_path / "m.onnx", OnnxForm(exporter), {})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("m.onnx", b"old")]


def test_missing_folder_is_told_before_the_export(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        export_module(Untranslatable(), SHAPE, tmp_path / "missing" / "m.onnx", OnnxForm(), {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exporter": "onnxscript"}, "Known exporters: dynamo, torchscript"),
        ({"exporter": "dynamo", "opset": 13}, "writes opsets 18 to"),
        ({"exporter": "torchscript", "opset": 23}, "writes opsets 13 to 20"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_impossible_form_is_an_error(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        OnnxForm(**arguments)  # type: ignore[arg-type]  # wrong on purpose
