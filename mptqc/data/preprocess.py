"""How a picture becomes a model's input, as a value that can be stored in the model.

    picture → [resize] → [center crop] → image_size        uint8 pixels, 0..255
    x = (pixel · scale − mean) / std                        float32, per channel

Geometry is torchvision's: `resize` as a number is the shorter side, the longer one is cut down to a whole number; the
crop's offset is rounded. Pillow resizes, with antialiasing. As in timm and torchvision, EXIF
orientation is not applied.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mptqc.errors import DataError

METADATA_KEY = "mptqc.preprocess"
"""Key of a compiled model's metadata_props that holds its preprocessing as JSON."""

DEFAULT_IMAGE_SIZE = (224, 224)

PositiveInt = Annotated[int, Field(gt=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Crop = Literal["center", "none"]


class Preprocessing(BaseModel):
    """Resizing, cropping and normalisation of 8-bit pictures. Compares by value; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image_size: tuple[PositiveInt, PositiveInt] | None = None
    """(height, width) in pixels that the model takes; None means that of the model's input."""
    resize: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """Before the crop: the shorter side in pixels, or (height, width) regardless of the picture's aspect.

    None resizes nothing when `crop` is "center", and stretches to `image_size` when it is "none"."""
    crop: Crop = "none"
    interpolation: Interpolation = "bicubic"
    mean: tuple[Finite, ...] = (0.0,)
    """One value per channel, or one for all, in units of pixel · scale."""
    std: tuple[Positive, ...] = (1.0,)
    """One value per channel, or one for all, in units of pixel · scale."""
    scale: Positive = 1 / 255

    @model_validator(mode="after")
    def _mean_and_std_fit(self) -> "Preprocessing":
        if not self.mean or not self.std:
            raise ValueError("mean and std need at least one value")
        if len(self.mean) != len(self.std) and 1 not in (len(self.mean), len(self.std)):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}")
        return self

    def normalize(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Turn uint8 pixels [B, C, H, W] into float32 model input of the same shape.

        Raises:
            DataError: mean or std have neither one value nor one per channel.
        """
        mean, std = self._per_channel("mean", pixels.shape[1]), self._per_channel("std", pixels.shape[1])
        scaled = pixels.astype(np.float32) * np.float32(self.scale)
        return (scaled - mean) / std

    def check_channels(self, channels: int) -> None:
        """Raise DataError unless mean and std have one value, or one per channel."""
        self._per_channel("mean", channels)
        self._per_channel("std", channels)

    def _per_channel(self, name: Literal["mean", "std"], channels: int) -> npt.NDArray[np.float32]:
        values: tuple[float, ...] = getattr(self, name)
        if len(values) not in (1, channels):
            raise DataError(
                f"preprocessing has {len(values)} {name} values, but the model takes {channels} channel(s); give one "
                f"value, or one per channel, with --{name} or --preprocess."
            )
        return np.asarray(values, np.float32).reshape(1, -1, 1, 1)

    def to_json(self) -> str:
        """Return the JSON that `from_json` and `from_metadata` read back to an equal value; same value, same text."""
        return self.model_dump_json()


def from_json(text: str, *, where: str) -> Preprocessing:
    """Read what `Preprocessing.to_json` wrote; `where` names the text's origin in errors.

    Raises:
        DataError: it is not JSON, has an unknown key, or a value out of range.
    """
    try:
        return Preprocessing.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"{where} is not a valid preprocessing: {describe(error)}.") from error


def describe(error: ValidationError) -> str:
    """Put a validation error on one line: every wrong field, what is wrong, and the known fields."""
    problems = "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'whole'}: {item['msg']}" for item in error.errors()
    )
    return f"{problems} (known fields: {', '.join(Preprocessing.model_fields)})"


def from_metadata(properties: Mapping[str, str]) -> Preprocessing | None:
    """Return the preprocessing stored in a model's metadata_props, or None if it carries none.

    Raises:
        DataError: the stored text is not a preprocessing.
    """
    text = properties.get(METADATA_KEY)
    return None if text is None else from_json(text, where=f"the model's metadata {METADATA_KEY!r}")


def preset(name: str, image_size: tuple[int, int] | None = None) -> Preprocessing:
    """Return a preset for a model of `image_size` (height, width; 224 × 224 if None).

    * "imagenet": shorter side to size / 0.875, center crop, bilinear; ImageNet's mean and std (torchvision, DeiT).
    * "inception": shorter side to size / 0.9, center crop, bicubic; mean and std 0.5 (ViT of Google, timm augreg).
    * "clip": shorter side to size, center crop, bicubic; CLIP's mean and std.
    * "none": stretched to size, bicubic; pixels to 0..1 and nothing else.

    Raises:
        DataError: the name is unknown; lists the known ones.
    """
    height, width = image_size or DEFAULT_IMAGE_SIZE
    if name not in _PRESETS:
        raise DataError(f"unknown preprocessing preset {name!r}. Known presets: {', '.join(PRESETS)}.")
    crop_fraction, interpolation, mean, std = _PRESETS[name]
    resize = None if crop_fraction is None else math.floor(max(height, width) / crop_fraction)
    return Preprocessing(
        image_size=(height, width),
        resize=resize,
        crop="none" if crop_fraction is None else "center",
        interpolation=interpolation,
        mean=mean,
        std=std,
    )


_PRESETS: Mapping[str, tuple[float | None, Interpolation, tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (0.875, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": (0.9, "bicubic", (0.5,), (0.5,)),
    "clip": (1.0, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": (None, "bicubic", (0.0,), (1.0,)),
}

PRESETS: tuple[str, ...] = tuple(_PRESETS)
"""Names that `preset` knows."""
