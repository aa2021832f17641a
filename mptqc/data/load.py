"""Open a folder of pictures or an array file as samples for a model input."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mptqc.data.arrays import ArraySource, read_arrays
from mptqc.data.images import MODES, check_readable, list_images, read_image
from mptqc.data.preprocess import Preprocessing
from mptqc.data.samples import FloatImages, Hash, Samples, shape_text
from mptqc.errors import DataError

logger = logging.getLogger(__name__)

DEFAULT_CHANNELS = 3
"""Channels of pictures for a model whose channel dimension is dynamic."""

NEEDS_PREPROCESSING = (
    "mptqc does not guess how pixels are normalised, because a wrong guess costs accuracy silently. Give "
    "--preprocess (imagenet, inception, clip, none, or a timm or transformers config file), or --mean and --std."
)


def load_samples(
    path: str | Path,
    *,
    input_name: str,
    input_shape: Sequence[int | None],
    preprocessing: Preprocessing | None,
    limit: int | None = None,
    seed: int = 0,
) -> Samples:
    """Open the samples at `path` for a model input; nothing is decoded yet but the headers.

    Args:
        path: a folder of pictures (sub-folders are labels, see `list_images`), a .npz file (the array `images`, or
            one named like the input; optional `labels`), or a .npy file. Arrays are [N, C, H, W]: uint8 pixels at the
            model's size, of which only scale, mean and std are applied, or float32, taken as already preprocessed.
        input_name: name of the model's input.
        input_shape: its shape [N, C, H, W]; None for a dynamic dimension.
        preprocessing: needed for pictures and uint8 arrays. Its image_size defaults to the input's.
        limit: use at most this many, drawn with `seed`.
        seed: of the draw.

    Raises:
        DataError: nothing to read, a file that cannot be read, or data that does not fit the input.
    """
    path = Path(path)
    if len(input_shape) != 4:
        raise DataError(
            f"the model's input {input_name!r} has shape {shape_text(input_shape)}; image data fits inputs "
            "[N, C, H, W] only."
        )
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of images, a .npz or a .npy file.")
    if path.is_dir():
        samples = _from_folder(path, input_shape, preprocessing)
    else:
        samples = _from_arrays(path, input_name, input_shape, preprocessing)
    if limit is not None:
        if limit > samples.count:
            logger.warning("%d samples were asked for, %s has only %d: all are used", limit, path, samples.count)
        samples = samples.take(limit, seed)
    samples.check_headers()
    return samples


def fit_preprocessing(preprocessing: Preprocessing, input_shape: Sequence[int | None]) -> Preprocessing:
    """Return `preprocessing` with the input's size, where that is static.

    Raises:
        DataError: it is for another size, or neither it nor the model says what size.
    """
    size = (input_shape[2], input_shape[3])
    wanted = preprocessing.image_size
    if None in size:
        if wanted is None:
            raise DataError(
                f"the model's input size is dynamic ({shape_text(input_shape)}) and the preprocessing has no "
                "image_size; give --preprocess with a config that has one."
            )
        return preprocessing
    if wanted is None:
        return preprocessing.model_copy(update={"image_size": size})
    if wanted != size:
        raise DataError(
            f"the preprocessing makes images of {wanted[0]} x {wanted[1]}, but the model takes {size[0]} x {size[1]}; "
            "give a --preprocess that fits the model."
        )
    return preprocessing


def _from_folder(path: Path, input_shape: Sequence[int | None], preprocessing: Preprocessing | None) -> Samples:
    if preprocessing is None:
        raise DataError(f"{path} holds pictures, and nothing says how to preprocess them: {NEEDS_PREPROCESSING}")
    channels = input_shape[1] or DEFAULT_CHANNELS
    if channels not in MODES:
        raise DataError(
            f"the model takes {channels} channels; pictures give 1 (grey) or 3 (RGB). Pass a .npz file with arrays "
            f"[N, {channels}, H, W]."
        )
    fitted = fit_preprocessing(preprocessing, input_shape)
    fitted.check_channels(channels)
    folder = list_images(path)
    source = FolderSource(folder.paths, fitted, channels)
    return Samples(source, range(len(folder.paths)), folder.labels, folder.label_names)


def _from_arrays(
    path: Path, input_name: str, input_shape: Sequence[int | None], preprocessing: Preprocessing | None
) -> Samples:
    arrays = read_arrays(path, input_name, input_shape)
    if arrays.images.dtype != np.uint8:
        return Samples(ArraySource(arrays, None), range(len(arrays.images)), arrays.labels)
    if preprocessing is None:
        raise DataError(f"{arrays.where} holds uint8 pixels, and nothing says how to preprocess: {NEEDS_PREPROCESSING}")
    fitted = fit_preprocessing(preprocessing, input_shape)
    fitted.check_channels(arrays.images.shape[1])
    return Samples(ArraySource(arrays, fitted), range(len(arrays.images)), arrays.labels)


class FolderSource:
    """Pictures decoded each time they are asked for."""

    def __init__(self, paths: Sequence[Path], preprocessing: Preprocessing, channels: int) -> None:
        self._paths = tuple(paths)
        self._preprocessing = preprocessing
        self._channels = channels

    def read(self, indices: Sequence[int]) -> FloatImages:
        """Decode, resize, crop and normalise the pictures: float32 [B, C, H, W]."""
        pixels = [read_image(self._paths[index], self._preprocessing, self._channels) for index in indices]
        return self._preprocessing.normalize(np.stack(pixels))

    def check(self, indices: Sequence[int]) -> None:
        """Raise DataError for the first picture whose header Pillow does not recognise."""
        for index in indices:
            check_readable(self._paths[index])

    def name(self, index: int) -> str:
        """Return the picture's path."""
        return str(self._paths[index])

    def hash_into(self, digest: Hash, indices: Sequence[int]) -> None:
        """Feed the files' bytes, the preprocessing and the channel count."""
        digest.update(f"folder {self._channels} {self._preprocessing.to_json()}".encode())
        for index in indices:
            content = self._paths[index].read_bytes()
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
