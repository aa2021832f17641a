import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mptqc.export.packages import import_timm

pytest.importorskip("torch")
pytest.importorskip("huggingface_hub")
timm = import_timm()

from mptqc.errors import ModelError  # noqa: E402 - after importorskip
from mptqc.export import export_timm  # noqa: E402
from mptqc.runtime.session import create_session  # noqa: E402

SIZE = 32  # four patches of 16: the graph of the full model, a fraction of its time


def export_small(output: Path, name: str = "vit_tiny_patch16_224", *, seed: int = 0, image_size: int = SIZE) -> None:
    export_timm(name, output, pretrained=False, image_size=image_size, exporter="torchscript", seed=seed)


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("vit_tiny_patch16_224", 32),
        ("deit_tiny_distilled_patch16_224", 32),
        ("swin_tiny_patch4_window7_224", 56),
        ("swinv2_tiny_window8_256", 64),
        ("eva02_tiny_patch14_336", 28),
        ("pit_ti_224", 64),
        ("cait_xxs24_224", 32),
    ],
)
def test_families_run_in_onnx_runtime(tmp_path: Path, name: str, image_size: int) -> None:
    export_small(tmp_path / "m.onnx", name, image_size=image_size)
    images = np.zeros((2, 3, image_size, image_size), np.float32)
    (logits,) = create_session(tmp_path / "m.onnx", threads=1).run(["logits"], {"images": images})
    assert logits.shape == (2, 1000)
    assert np.isfinite(logits).all()


def test_dynamo_writes_attention_operators(tmp_path: Path) -> None:
    export_timm(
        "vit_tiny_patch16_224",
        tmp_path / "m.onnx",
        pretrained=False,
        image_size=SIZE,
        exporter="dynamo",
        opset=23,
        fused_attention=True,
    )
    operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert operators.count("Attention") == 12
    assert "Softmax" not in operators


def test_attention_is_eager_by_default_and_the_setting_is_put_back(tmp_path: Path) -> None:
    before = timm.layers.config.use_fused_attn()
    export_small(tmp_path / "m.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node].count("Softmax") == 12
    assert timm.layers.config.use_fused_attn() == before


def test_random_weights_have_no_constant_bias(tmp_path: Path) -> None:
    export_small(tmp_path / "m.onnx")
    initializers = onnx.load(tmp_path / "m.onnx").graph.initializer
    vectors = [numpy_helper.to_array(i) for i in initializers if len(i.dims) == 1 and i.dims[0] >= 192]
    assert len(vectors) == 12 * 8 + 4  # per block two norms and four Linears; patch embedding, last norm, head
    assert all(vector.std() > 0 for vector in vectors)


def test_seed_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        export_small(tmp_path / name, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_preprocessing_is_in_the_file(tmp_path: Path) -> None:
    export_small(tmp_path / "m.onnx")
    entries = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(entries["mptqc.preprocess"]) == {
        "image_size": [SIZE, SIZE],
        "resize": 35,  # 32 / 0.9, rounded down
        "crop": "center",
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "scale": 1 / 255,
    }


def test_weights_that_cannot_be_had_name_the_random_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ModelError, match=r"'vit_tiny_patch16_224' cannot be had: no route to the hub.*--random"):
        export_timm("vit_tiny_patch16_224", tmp_path / "m.onnx", pretrained=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch16_224", r"no model named 'vit_smal_patch16_224'.*vit_small_patch16_224"),
        ("xyz", r"no model named 'xyz'.*deit_tiny_patch16_224"),
        ("resnet50", r"'resnet50' is no plain vision transformer.*swin_"),
    ],
)
def test_unknown_name_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        export_timm(name, tmp_path / "m.onnx", pretrained=False)


def test_impossible_image_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="image size 20"):
        export_small(tmp_path / "m.onnx", image_size=20)
