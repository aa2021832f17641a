"""Translate the preprocessing that timm and transformers publish with a model into mptqc's fields.

The fields: `image_size` (height, width) that the model reads, `resize` (the shorter side is scaled to it first, in
pixels; None: both sides are scaled to `image_size`), `crop` ("center" or "none"), `interpolation`, and per channel
(pixel · scale − mean) / std.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mptqc.errors import ModelError

PREPROCESS_KEY = "mptqc.preprocess"
PIXEL_SCALE = 1 / 255
# transformers writes Pillow's resampling filters as numbers.
PILLOW_FILTERS: Mapping[int, str] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def of_timm(config: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, object]:
    """Translate timm's `pretrained_cfg` for inputs of `image_size` (height, width).

    timm scales the shorter side to size / crop_pct and crops the centre; in its "squash" mode it scales both sides.
    """
    squash = config.get("crop_mode") == "squash"
    shorter = math.floor(min(image_size) / float(config.get("crop_pct") or 1.0))
    return _fields(
        image_size,
        resize=None if squash else shorter,
        interpolation=config.get("interpolation") or "bicubic",
        mean=config["mean"],
        std=config["std"],
        scale=PIXEL_SCALE,
    )


def of_transformers(config: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, object]:
    """Translate the content of preprocessor_config.json for inputs of `image_size` (height, width).

    Raises:
        ModelError: a field is missing, or the preprocessing has no equivalent in mptqc's fields.
    """
    number = config.get("resample", 2)
    if number not in PILLOW_FILTERS:
        raise ModelError(f"the preprocessor's resample is {number!r}; known filters: {sorted(PILLOW_FILTERS)}.")
    if config.get("do_normalize", True):
        try:
            mean, std = config["image_mean"], config["image_std"]
        except KeyError as error:
            raise ModelError(f"the preprocessor's configuration has no {error}, so pixels cannot be scaled.") from error
    else:
        mean, std = [0.0], [1.0]
    rescaled = config.get("do_rescale", True)
    return _fields(
        image_size,
        resize=_shorter_side(config, image_size),
        interpolation=PILLOW_FILTERS[number],
        mean=mean,
        std=std,
        scale=float(config.get("rescale_factor", PIXEL_SCALE)) if rescaled else 1.0,
    )


def _shorter_side(config: Mapping[str, Any], image_size: tuple[int, int]) -> int | None:
    """Return what the shorter side is scaled to before the centre crop; None where both sides are scaled, uncropped."""
    size = config.get("size") or {}
    if isinstance(size, int):
        size = {"shortest_edge": size} if config.get("do_center_crop") else {"height": size, "width": size}
    if "shortest_edge" in size:
        return int(size["shortest_edge"])
    if not config.get("do_center_crop"):
        return None
    # Both sides are scaled, then cropped; for photographs near to square that is the shorter side and a crop.
    return int(min(size.get("height", min(image_size)), size.get("width", min(image_size))))


def _fields(
    image_size: tuple[int, int],
    *,
    resize: int | None,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
    scale: float,
) -> dict[str, object]:
    return {
        "image_size": list(image_size),
        "resize": resize,
        "crop": "none" if resize is None else "center",
        "interpolation": interpolation,
        "mean": list(mean),
        "std": list(std),
        "scale": scale,
    }
