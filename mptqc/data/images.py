"""Picture files as uint8 arrays: finding them, decoding them, bringing them to a model's size."""

import logging
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mptqc.data.preprocess import Interpolation, Preprocessing
from mptqc.errors import DataError

logger = logging.getLogger(__name__)

MODES: Mapping[int, str] = {1: "L", 3: "RGB"}
"""Pillow mode that pictures are converted to, by the channels the model takes."""

BACKGROUND = (255, 255, 255, 255)
"""Transparent pixels are laid on white, as viewers and most web pages show them."""

_RESAMPLING: Mapping[Interpolation, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# What Pillow and its codecs raise on a broken file.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder, in the order of their relative paths.

    `labels` is int64 [N] if every picture lies in a sub-folder, else None; `label_names` names each label: the label
    itself where every sub-folder's name is a whole number, otherwise its rank in sorted order.
    """

    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64] | None
    label_names: Mapping[int, str] | None


def list_images(folder: Path) -> ImageFolder:
    """Find every picture in `folder` and below that Pillow has a reader for, by the file's suffix.

    Raises:
        DataError: there is none.
    """
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder))),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    paths = tuple(path for path in files if path.suffix.lower() in suffixes)
    if not paths:
        raise DataError(
            f"no image in {folder}: it and its sub-folders hold {len(files)} file(s), none with a suffix that Pillow "
            "reads (.jpg, .png, .webp, ...). Give a folder of pictures, or a .npz or .npy file."
        )
    if len(paths) < len(files):
        logger.info("%s: %d of %d files are no pictures and are ignored", folder, len(files) - len(paths), len(files))
    labels, label_names = _labels(folder, paths)
    return ImageFolder(paths, labels, label_names)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _labels(folder: Path, paths: Sequence[Path]) -> tuple[npt.NDArray[np.int64], Mapping[int, str]] | tuple[None, None]:
    parents = [path.relative_to(folder).parts[:-1] for path in paths]
    loose = sum(not parts for parts in parents)
    if loose:
        if loose < len(paths):
            logger.warning(
                "%s: %d picture(s) lie in no sub-folder, so the sub-folders are not taken as labels", folder, loose
            )
        return None, None
    names = sorted({parts[0] for parts in parents})
    if all(name.isdecimal() for name in names):
        number = {name: int(name) for name in names}
    else:
        number = {name: rank for rank, name in enumerate(names)}
    labels = np.array([number[parts[0]] for parts in parents], np.int64)
    return labels, {label: name for name, label in number.items()}


def check_readable(path: Path) -> None:
    """Raise DataError unless Pillow recognises the file's header; the pixels are not decoded."""
    try:
        with Image.open(path):
            pass
    except _DECODE_ERRORS as error:
        raise _unreadable(path, error) from error


def read_image(path: Path, preprocessing: Preprocessing, channels: int) -> npt.NDArray[np.uint8]:
    """Decode a picture (its first frame) and bring it to the model's size.

    Args:
        path: a picture file of any format that Pillow reads.
        preprocessing: its `image_size` must be set; mean, std and scale are not applied here.
        channels: 1 (grey) or 3 (RGB).

    Returns:
        uint8 [C, H, W].

    Raises:
        DataError: unreadable file, unsupported pixel type, or a picture too small for the crop.
    """
    try:
        with Image.open(path) as image:
            image.load()
            converted = _convert(image, MODES[channels], path)
            fitted = _fit(converted, preprocessing, path)
            pixels = np.asarray(fitted, np.uint8)
    except _DECODE_ERRORS as error:
        raise _unreadable(path, error) from error
    return pixels.reshape(pixels.shape[0], pixels.shape[1], channels).transpose(2, 0, 1)


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as an image ({error}); remove it from the folder or mend it.")


def _convert(image: Image.Image, mode: str, path: Path) -> Image.Image:
    if image.mode in ("I", "F"):
        raise DataError(
            f"{path} has 32-bit pixels (Pillow mode {image.mode}) of unknown range; convert it to 8 bits, or pass "
            "preprocessed float32 arrays as a .npz file."
        )
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), with_alpha)
    return image if image.mode == mode else image.convert(mode)


def _fit(image: Image.Image, preprocessing: Preprocessing, path: Path) -> Image.Image:
    if preprocessing.image_size is None:
        raise DataError("preprocessing has no image_size and the model's input size is dynamic; give --preprocess.")
    height, width = preprocessing.image_size
    resized = _resize(image, preprocessing, (height, width))
    if preprocessing.crop == "none":
        if resized.size != (width, height):
            raise DataError(
                f"{path}: after the shorter side was resized to {preprocessing.resize} the picture is "
                f"{resized.height} x {resized.width}, but the model takes {height} x {width}; set crop to 'center'."
            )
        return resized
    if resized.width < width or resized.height < height:
        raise DataError(
            f"{path} is {resized.height} x {resized.width} before the center crop to {height} x {width}: too small; "
            "set resize in the preprocessing."
        )
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    return resized.crop((left, top, left + width, top + height))


def _resize(image: Image.Image, preprocessing: Preprocessing, image_size: tuple[int, int]) -> Image.Image:
    resize = preprocessing.resize
    if resize is None:
        if preprocessing.crop == "center":
            return image
        height, width = image_size
    elif isinstance(resize, tuple):
        height, width = resize
    elif image.width <= image.height:
        height, width = resize * image.height // image.width, resize
    else:
        height, width = resize, resize * image.width // image.height
    if image.size == (width, height):
        return image
    return image.resize((width, height), _RESAMPLING[preprocessing.interpolation])
