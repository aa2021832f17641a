"""Preprocessing read from where people have it: a preset's name, a timm or transformers config, our JSON, flags."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mptqc.data.preprocess import (
    DEFAULT_IMAGE_SIZE,
    PRESETS,
    Interpolation,
    Preprocessing,
    describe,
    from_metadata,
    preset,
)
from mptqc.errors import DataError

logger = logging.getLogger(__name__)

PILLOW_RESAMPLING: Mapping[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's resampling codes, as preprocessor_config.json writes them."""


def choose_preprocessing(
    *,
    source: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    metadata: Mapping[str, str],
    image_size: tuple[int, int] | None,
) -> Preprocessing | None:
    """Decide which preprocessing a command uses: flags win over the model's metadata, and differences are logged.

    Args:
        source: value of --preprocess: a preset's name or a JSON file's path; None if the flag was not given.
        mean: value of --mean, or None.
        std: value of --std, or None.
        metadata: the model's metadata_props.
        image_size: (height, width) of the model's input, or None if dynamic.

    With --mean or --std alone, the geometry is the metadata's, else shorter side to size and center crop, bicubic.
    Returns None when nothing says what the preprocessing is.

    Raises:
        DataError: a source is unknown or malformed.
    """
    stored = from_metadata(metadata)
    if source is None and mean is None and std is None:
        return stored
    if source is not None:
        chosen = load_preprocessing(source, image_size=image_size)
    else:
        chosen = stored or _shorter_side_and_crop(image_size or DEFAULT_IMAGE_SIZE)
    chosen = with_mean_and_std(chosen, mean=mean, std=std)
    if stored is not None and chosen != stored:
        changed = [name for name in Preprocessing.model_fields if getattr(chosen, name) != getattr(stored, name)]
        logger.warning(
            "the flags override the preprocessing stored in the model, in %s: %s instead of %s",
            ", ".join(changed),
            [getattr(chosen, name) for name in changed],
            [getattr(stored, name) for name in changed],
        )
    return chosen


def with_mean_and_std(
    base: Preprocessing, *, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Preprocessing:
    """Return `base` with another mean or std where one is given.

    Raises:
        DataError: a value is out of range, or their counts differ.
    """
    changes = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    return _validated({**base.model_dump(), **changes}, where="--mean/--std")


def load_preprocessing(source: str | Path, *, image_size: tuple[int, int] | None = None) -> Preprocessing:
    """Read a preset's name, a timm config.json, a transformers preprocessor_config.json, or our own JSON.

    Args:
        source: preset name or path of a JSON file.
        image_size: (height, width) of the model's input; presets need it.

    Raises:
        DataError: neither a preset nor a file, not JSON, or a config that asks for a step mptqc does not have.
    """
    if isinstance(source, str) and source in PRESETS:
        return preset(source, image_size)
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"--preprocess {source} is neither a preset ({', '.join(PRESETS)}) nor a JSON file that exists."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} holds a JSON {type(config).__name__}; a preprocessing is an object.")
    config = config.get("pretrained_cfg", config)
    if "input_size" in config:
        return _from_timm(config, path)
    if "image_mean" in config or "do_normalize" in config or "image_processor_type" in config:
        return _from_transformers(config, path)
    return _validated(config, where=str(path))


def _shorter_side_and_crop(image_size: tuple[int, int]) -> Preprocessing:
    return Preprocessing(image_size=image_size, resize=max(image_size), crop="center")


def _validated(fields: Mapping[str, Any], *, where: str) -> Preprocessing:
    try:
        return Preprocessing.model_validate(fields)
    except ValidationError as error:
        raise DataError(f"{where} is not a valid preprocessing: {describe(error)}.") from error


def _from_timm(config: Mapping[str, Any], path: Path) -> Preprocessing:
    _, height, width = _needed(config, "input_size", path)
    crop_fraction = config.get("crop_pct", 0.875)
    mode = config.get("crop_mode", "center")
    if mode not in ("center", "squash"):
        raise DataError(f"{path}: crop_mode {mode!r} is not supported; mptqc has center and squash.")
    if mode == "center" and height != width:
        raise DataError(f"{path}: crop_mode 'center' with a {height} x {width} input is not supported; use 'squash'.")
    scaled = (math.floor(height / crop_fraction), math.floor(width / crop_fraction))
    return _validated(
        {
            "image_size": (height, width),
            "resize": scaled if mode == "squash" else scaled[0],
            "crop": "center",
            "interpolation": config.get("interpolation", "bilinear"),
            "mean": _needed(config, "mean", path),
            "std": _needed(config, "std", path),
        },
        where=str(path),
    )


def _from_transformers(config: Mapping[str, Any], path: Path) -> Preprocessing:
    for unsupported in ("do_pad", "do_flip_channel_order", "crop_pct"):
        if config.get(unsupported):
            raise DataError(f"{path}: {unsupported} is not supported; resize the images yourself and pass a .npz.")
    resize = _transformers_resize(config, path) if config.get("do_resize", True) else None
    crops = bool(config.get("do_center_crop", False))
    image_size: tuple[int, int] | None
    if crops:
        image_size = _height_width(_needed(config, "crop_size", path), "crop_size", path)
    elif isinstance(resize, tuple) or resize is None:
        image_size = resize
    else:
        raise DataError(f"{path}: size has shortest_edge but do_center_crop is off, so no fixed image size follows.")
    normalizes = config.get("do_normalize", True)
    code = config.get("resample", 2)
    if code not in PILLOW_RESAMPLING:
        raise DataError(f"{path}: resample {code!r} is not supported; known codes: {PILLOW_RESAMPLING}.")
    return _validated(
        {
            "image_size": image_size,
            "resize": resize,
            "crop": "center" if crops else "none",
            "interpolation": PILLOW_RESAMPLING[code],
            "mean": _needed(config, "image_mean", path) if normalizes else (0.0,),
            "std": _needed(config, "image_std", path) if normalizes else (1.0,),
            "scale": config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
        },
        where=str(path),
    )


def _transformers_resize(config: Mapping[str, Any], path: Path) -> int | tuple[int, int]:
    size = _needed(config, "size", path)
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return _height_width(size, "size", path)


def _height_width(size: object, name: str, path: Path) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    raise DataError(f"{path}: {name} is {size!r}; mptqc reads a number, height and width, or shortest_edge.")


def _needed(config: Mapping[str, Any], key: str, path: Path) -> Any:
    if config.get(key) is None:
        raise DataError(f"{path} has no {key!r}; it is needed to preprocess images. Keys found: {', '.join(config)}.")
    return config[key]
