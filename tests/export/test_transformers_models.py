import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from mptqc.errors import ModelError
from mptqc.export import export_transformers
from mptqc.runtime.session import create_session

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="optional; pip install transformers")

from mptqc.export.packages import import_transformers  # noqa: E402 - after importorskip

transformers = import_transformers()

PLAIN = {
    "image_size": 32, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
SMALL = {
    **dict.fromkeys(("vit", "deit", "data2vec-vision", "dinov2", "dinov2_with_registers", "dinov3_vit"), PLAIN),
    **dict.fromkeys(("vit_msn", "ijepa"), PLAIN),
    "beit": {**PLAIN, "use_relative_position_bias": True},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "clip": {"vision_config": PLAIN, "projection_dim": 24},
    "siglip": {"vision_config": PLAIN},
}
WIDTHS = {"dinov3_vit": 32, "clip": 512, "siglip": 32}
"""Of the features of those that have no classes; CLIP's projection is that of its vision part."""
PREPROCESSOR = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# float32 through two blocks of width 32: a few hundred roundings of 2^-24 in logits below 1
FLOAT_TOLERANCE = 1e-4


def saved(folder: Path, model_type: str, *, preprocessor: bool = True) -> str:
    config = transformers.AutoConfig.for_model(model_type, **SMALL[model_type])
    config.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return str(folder)


@pytest.mark.parametrize("model_type", list(SMALL))
def test_config_gives_a_model_with_random_weights(tmp_path: Path, model_type: str) -> None:
    output = tmp_path / "m.onnx"
    exporter = "dynamo" if model_type == "dinov2_with_registers" else "torchscript"  # which cannot resize its positions
    export_transformers(saved(tmp_path, model_type), output, pretrained=False, exporter=exporter)
    images = np.zeros((3, 3, 32, 32), np.float32)
    (logits,) = create_session(output, threads=1).run(["logits"], {"images": images})
    assert logits.shape == (3, WIDTHS.get(model_type, 2))
    assert np.isfinite(logits).all()
    fields = json.loads({entry.key: entry.value for entry in onnx.load(output).metadata_props}["mptqc.preprocess"])
    assert (fields["image_size"], fields["interpolation"]) == ([32, 32], "bilinear")


def test_saved_weights_give_the_outputs_of_torch(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(saved(tmp_path, "vit"))
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    export_transformers(str(tmp_path), tmp_path / "m.onnx", pretrained=True)
    images = torch.randn((2, 3, 32, 32))
    (logits,) = create_session(tmp_path / "m.onnx", threads=1).run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = model(pixel_values=images).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=FLOAT_TOLERANCE)


def test_without_preprocessor_the_file_carries_none(tmp_path: Path) -> None:
    name = saved(tmp_path, "vit", preprocessor=False)
    export_transformers(name, tmp_path / "m.onnx", pretrained=False, exporter="torchscript")
    assert not onnx.load(tmp_path / "m.onnx").metadata_props


def test_missing_weights_name_the_random_option(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weights of .* cannot be had.*--random"):
        export_transformers(saved(tmp_path, "vit"), tmp_path / "m.onnx", pretrained=True)
    assert not (tmp_path / "m.onnx").exists()


def test_folder_without_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        export_transformers(str(tmp_path), tmp_path / "m.onnx", pretrained=False)


def test_other_model_type_is_an_error(tmp_path: Path) -> None:
    transformers.AutoConfig.for_model("resnet").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"type 'resnet'.*vit, deit, swin"):
        export_transformers(str(tmp_path), tmp_path / "m.onnx", pretrained=False)
