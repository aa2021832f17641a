"""What the zoo commits: image archives, preprocessing, the exported models and their float accuracy."""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mptqc.data.preprocess import METADATA_KEY, Preprocessing
from mptqc.export.onnx_writer import OnnxForm, export_module
from mptqc.runtime.session import create_session

CALIBRATION_COUNT, TEST_COUNT = 512, 2000
MAX_MODEL_BYTES = 4_000_000
EVALUATION_BATCH = 250
# Different exporters and opsets on purpose: the tests that compile the zoo then read both kinds of graph.
FORMS: Mapping[str, OnnxForm] = {
    "vit": OnnxForm("dynamo", 20),
    "deit": OnnxForm("torchscript", 14),
    "swin": OnnxForm("torchscript", 17),
}


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, 1, 28, 28] and labels int64 [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def sample(self, count: int, seed: int) -> "Split":
        """Return `count` images, drawn without replacement."""
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.labels))[:count])
        return Split(self.images[chosen], self.labels[chosen])


def preprocessing(mean: float, std: float) -> Preprocessing:
    """Return the zoo's preprocessing: (pixel / 255 − mean) / std, nothing resized."""
    return Preprocessing(image_size=(28, 28), interpolation="bilinear", mean=(mean,), std=(std,))


def write_data(folder: Path, calibration: Split, test: Split, steps: Preprocessing) -> None:
    """Write calibration.npz, test.npz and preprocess.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_archive(folder / "calibration.npz", calibration)
    write_archive(folder / "test.npz", test)
    (folder / "preprocess.json").write_text(steps.to_json() + "\n", encoding="utf-8")


def write_archive(path: Path, split: Split) -> None:
    """Write `images` and `labels` as a compressed .npz with a fixed date: the same split gives the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in (("images", split.images), ("labels", split.labels)):
            content = io.BytesIO()
            np.save(content, array)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content.getvalue())


def write_model(folder: Path, name: str, model: nn.Module, steps: Preprocessing) -> Path:
    """Export `model` to `<folder>/<name>.onnx` in the form that FORMS gives it; return the path."""
    path = folder / f"{name}.onnx"
    export_module(model, (1, 28, 28), path, FORMS[name], {METADATA_KEY: steps.to_json()})
    if path.stat().st_size > MAX_MODEL_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, more than the {MAX_MODEL_BYTES} that are committed")
    return path


def onnx_top1(path: Path, split: Split, steps: Preprocessing) -> float:
    """Return the top-1 accuracy of the ONNX file in ONNX Runtime."""
    session = create_session(path, threads=1)
    correct = 0
    for start in range(0, len(split.labels), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        (logits,) = session.run(None, {"images": steps.normalize(split.images[part])})
        correct += int((logits.argmax(axis=1) == split.labels[part]).sum())
    return correct / len(split.labels)
