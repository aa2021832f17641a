"""Samples that already are arrays: .npz and .npy files."""

import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mptqc.data.preprocess import Preprocessing
from mptqc.data.samples import FloatImages, Hash, Labels
from mptqc.errors import DataError

logger = logging.getLogger(__name__)

IMAGES_KEY = "images"
LABELS_KEY = "labels"

RAW_PIXEL_LIMIT = 32.0
"""Normalised images stay within a few units; float values above this look like pixels that nobody normalised."""


@dataclass(frozen=True)
class Arrays:
    """Images [N, C, H, W], uint8 or float32, labels int64 [N] or None, and where they are from."""

    images: npt.NDArray[Any]
    labels: Labels | None
    where: str


class ArraySource:
    """Rows of an array; uint8 rows are normalised as they are read, float32 rows are taken as they are."""

    def __init__(self, arrays: Arrays, preprocessing: Preprocessing | None) -> None:
        self._images = arrays.images
        self._where = arrays.where
        self._preprocessing = preprocessing
        self._warned = False

    def read(self, indices: Sequence[int]) -> FloatImages:
        """Return float32 [B, C, H, W]."""
        rows = self._images[list(indices)]
        if self._preprocessing is not None:
            return self._preprocessing.normalize(rows)
        images = np.asarray(rows, np.float32)
        if not self._warned and np.abs(images).max() > RAW_PIXEL_LIMIT:
            self._warned = True
            logger.warning(
                "%s: float32 images are taken as already preprocessed, but hold values up to %g; if these are raw "
                "pixels, store them as uint8 and give --preprocess",
                self._where,
                np.abs(images).max(),
            )
        return images

    def check(self, indices: Sequence[int]) -> None:
        """Nothing to look at: the array's shape and type were checked when it was opened."""

    def name(self, index: int) -> str:
        """Return the file and row."""
        return f"{self._where}, row {index}"

    def hash_into(self, digest: Hash, indices: Sequence[int]) -> None:
        """Feed the rows' bytes, their shape and type, and the preprocessing."""
        preprocessing = "none" if self._preprocessing is None else self._preprocessing.to_json()
        digest.update(f"array {self._images.dtype} {self._images.shape[1:]} {preprocessing}".encode())
        for index in indices:
            digest.update(np.ascontiguousarray(self._images[index]).tobytes())


def read_arrays(path: Path, input_name: str, input_shape: Sequence[int | None]) -> Arrays:
    """Read the images and labels of a .npz or .npy file and check their shapes and types.

    A .npz file's images are the array named like the input, else `images`; `labels` are optional. A .npy file is
    mapped, not read.

    Raises:
        DataError: it is no such file, lacks the images, or they do not fit the input [N, C, H, W].
    """
    if path.suffix not in (".npz", ".npy"):
        raise DataError(f"{path} is neither a folder of images nor a .npz or .npy file.")
    try:
        if path.suffix == ".npy":
            images, labels, where = np.load(path, mmap_mode="r", allow_pickle=False), None, str(path)
        else:
            images, labels, where = _read_npz(path, input_name)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a NumPy file ({error}); write it with numpy.savez.") from error
    _check_images(images, where, input_shape)
    return Arrays(images, None if labels is None else _checked_labels(labels, len(images), path), where)


def _read_npz(path: Path, input_name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None, str]:
    with np.load(path, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is a single array with the suffix .npz; write it with numpy.savez(images=...).")
        key = next((name for name in (input_name, IMAGES_KEY) if name in archive.files), None)
        if key is None:
            raise DataError(
                f"{path} has neither {input_name!r} (the model's input) nor {IMAGES_KEY!r}; it holds: "
                f"{', '.join(archive.files) or 'nothing'}. Save it as numpy.savez(path, images=..., labels=...)."
            )
        labels = archive[LABELS_KEY] if LABELS_KEY in archive.files else None
        return archive[key], labels, f"{path} ({key})"


def _check_images(images: npt.NDArray[Any], where: str, input_shape: Sequence[int | None]) -> None:
    if images.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"{where} is {images.dtype}; give uint8 pixels, or float32 values that are already preprocessed "
            "(images.astype(numpy.float32))."
        )
    wanted = ["N", *("any" if size is None else str(size) for size in input_shape[1:])]
    fits = images.ndim == 4 and all(
        size in (None, actual) for size, actual in zip(input_shape[1:], images.shape[1:], strict=True)
    )
    if not fits:
        channels_last = images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3)
        hint = " They look channels-last: store images.transpose(0, 3, 1, 2)." if channels_last else ""
        raise DataError(
            f"{where} has shape {list(images.shape)}, but the model takes [{', '.join(wanted)}].{hint} Arrays are not "
            "resized; a folder of pictures is."
        )
    if len(images) == 0:
        raise DataError(f"{where} holds no image (shape {list(images.shape)}).")


def _checked_labels(labels: npt.NDArray[Any], count: int, path: Path) -> Labels:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: {LABELS_KEY!r} is {labels.dtype} of shape {list(labels.shape)}; give whole numbers [N]."
        )
    if len(labels) != count:
        raise DataError(f"{path} has {count} images but {len(labels)} labels; every image needs one label.")
    if labels.min() < 0:
        raise DataError(f"{path}: label {labels.min()} is negative; classes are numbered from 0.")
    return labels.astype(np.int64)
