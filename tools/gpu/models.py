"""The models of the check: random weights, right for speed, made where they are not there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from random_vit import VitShape, write_random_vit

from mptqc import api
from mptqc.graph.io import save_model

FORMS = ("float32", "float16", "stock QDQ", "mptqc")
"""What the benchmark compares."""
CALIBRATION_IMAGES = 4
QUICK = MappingProxyType(
    {
        "samples": CALIBRATION_IMAGES,
        "range_method": "min-max",
        "smoothing": False,
        "attention_folds": False,
        "compensation": False,
    }
)


@dataclass(frozen=True)
class Subject:
    """A model to measure: made without torch where it is a plain ViT, else by timm's exporter."""

    name: str
    timm_name: str | None
    shape: VitShape | None = None

    @property
    def image(self) -> int:
        """Height and width in pixels."""
        return 224 if self.shape is None else self.shape.image


VIT_B = VitShape(width=768, depth=12, heads=12)
SUBJECTS: Mapping[str, Subject] = MappingProxyType(
    {
        "vit-s": Subject("vit-s", "vit_small_patch16_224", VitShape()),
        "vit-b": Subject("vit-b", "vit_base_patch16_224", VIT_B),
        "deit-b": Subject("deit-b", "deit_base_distilled_patch16_224"),
        "swin-t": Subject("swin-t", "swin_tiny_patch4_window7_224"),
        "tiny": Subject("tiny", None, VitShape(image=32, patch=8, width=64, depth=2, heads=2)),
    }
)


def make_form(subject: Subject, form: str, folder: Path) -> Path:
    """The file of one form of a model."""
    path = folder / f"{subject.name}.{form.replace(' ', '-')}.onnx"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        MAKERS[form](subject, path)
    return path


def write_float32(subject: Subject, path: Path) -> None:
    """The model itself."""
    if subject.shape is not None:
        write_random_vit(path, subject.shape)
        return
    from mptqc.export.timm_models import export_timm

    assert subject.timm_name is not None, "a model is made either way"
    export_timm(subject.timm_name, path, pretrained=False)


def write_float16(subject: Subject, path: Path) -> None:
    """ONNX Runtime's own conversion; inputs and outputs stay float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    original = make_form(subject, "float32", path.parent)
    onnx.save(convert_float_to_float16(onnx.load(original), keep_io_types=True), path)


def write_stock(subject: Subject, path: Path) -> None:
    """ONNX Runtime's static quantization, in QDQ form."""
    from peers.ort_int8 import write_static_int8

    from mptqc.data.load import load_samples

    original = make_form(subject, "float32", path.parent)
    samples = load_samples(
        calibration(subject, path.parent), input_name="images", input_shape=(None, 3, subject.image, subject.image),
        preprocessing=None,
    )  # fmt: skip
    write_static_int8(original, path, samples, onnx.load(original).graph.input[0].name)


def write_portable(subject: Subject, path: Path) -> None:
    """8-bit weights and activations, in standard operators."""
    original, images = make_form(subject, "float32", path.parent), calibration(subject, path.parent)
    compiled = api.compile(original, images, preset="w8a8", options=dict(QUICK), verify=False)
    save_model(compiled.model, path)


def write_mptqc(subject: Subject, path: Path) -> None:
    """The portable form for CUDA, float16 between its operators."""
    save_model(api.lower(make_form(subject, "portable", path.parent), target="cuda").model, path)


def write_mptqc_float32(subject: Subject, path: Path) -> None:
    """The portable form for CUDA, float32 between its operators."""
    save_model(api.lower(make_form(subject, "portable", path.parent), target="cuda", float16=False).model, path)


def calibration(subject: Subject, folder: Path) -> Path:
    """Images of noise."""
    path = folder / f"{subject.name}.npz"
    if not path.is_file():
        np.savez(path, images=images_of(subject, CALIBRATION_IMAGES))
    return path


def images_of(subject: Subject, count: int) -> np.ndarray:
    """Images of noise, float32 [count, 3, H, W]."""
    size = (count, 3, subject.image, subject.image)
    return np.random.default_rng(0).standard_normal(size, dtype=np.float32)


MAKERS = MappingProxyType(
    {
        "float32": write_float32,
        "float16": write_float16,
        "stock QDQ": write_stock,
        "portable": write_portable,
        "mptqc": write_mptqc,
        "mptqc float32": write_mptqc_float32,
    }
)
