"""What the user asks for: a frozen recipe; unknown keys and values out of range are errors that name them."""

import tomllib
from collections.abc import Mapping
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mptqc.errors import RecipeError

Bits = Annotated[int, Field(ge=2, le=8)]


class RangeMethod(StrEnum):
    """How the scale and zero point of an activation are found."""

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    MSE = "mse"
    OUTPUT = "output"


class Coverage(StrEnum):
    """Which tensors are quantized; see METHOD, Sites."""

    PARTIAL = "partial"


class Target(StrEnum):
    """The operators that the result may use."""

    PORTABLE = "portable"
    CPU = "cpu"
    CPU_NATIVE = "cpu-native"
    CUDA = "cuda"
    TENSORRT = "tensorrt"

    @property
    def is_native(self) -> bool:
        """Whether it is written with the operators of `ai.mptqc`."""
        return self in (Target.CPU_NATIVE, Target.CUDA)


class SiteOverride(BaseModel):
    """Bits for the sites that match a pattern; None leaves the recipe's own value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: Bits | None = None
    activation_bits: Bits | None = None


class Recipe(BaseModel):
    """Every choice that changes the compiled model.

    Attributes:
        weight_bits: bits of every Linear's weight, 2..8.
        activation_bits: bits of every quantized activation, 2..8.
        end_bits: bits (weights and activations) of the patch embedding and the head.
        coverage: which tensors are quantized.
        target: operators the emitted model may use.
        samples: calibration images used, at most.
        views: augmented views made of each calibration image, the image itself included; 1 makes none.
        seed: seed of every random choice.
        range_method: how activation ranges are found.
        rotation: rotation of the residual streams and of the heads, seeded by `seed`.
        smoothing: SQ-b, scale and shift folded through LayerNorm.
        alphas: migration strengths tried per norm by SQ-b.
        opt_m: two-region quantizers for post-GELU and post-softmax tensors.
        attention_folds: K and V shifts, q/k and v/proj scales.
        compensation: sequential ridge, GPTQ and bias refit of every Linear.
        sites: overrides by site pattern (shell wildcards), the last match wins, e.g.
            {"block0?.fc2": {"activation_bits": 8}}.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: Bits = 8
    activation_bits: Bits = 8
    end_bits: Bits = 8
    coverage: Coverage = Coverage.PARTIAL
    target: Target = Target.PORTABLE
    samples: Annotated[int, Field(ge=1)] = 64
    views: Annotated[int, Field(ge=1, le=16)] = 1
    seed: Annotated[int, Field(ge=0)] = 0
    range_method: RangeMethod = RangeMethod.OUTPUT
    rotation: bool = False
    smoothing: bool = True
    alphas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.5, 0.7, 0.85, 1.0)
    opt_m: bool = True
    attention_folds: bool = True
    compensation: bool = True
    sites: Mapping[str, SiteOverride] = Field(default_factory=dict)

    def bits_of(self, site: str) -> tuple[int, int]:
        """(weight bits, activation bits) of a site after overrides."""
        at_an_end = site.startswith(("patch_embed", "head"))
        weight_bits, activation_bits = (self.end_bits,) * 2 if at_an_end else (self.weight_bits, self.activation_bits)
        for pattern, override in self.sites.items():
            if fnmatchcase(site, pattern):
                weight_bits = override.weight_bits or weight_bits
                activation_bits = override.activation_bits or activation_bits
        return weight_bits, activation_bits


PRESETS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        f"w{weight}a{activation}": MappingProxyType({"weight_bits": weight, "activation_bits": activation})
        for weight, activation in ((8, 8), (6, 6), (5, 5), (4, 4), (3, 3), (4, 8), (3, 8))
    }
)


def make_recipe(
    preset: str | None = None, path: Path | None = None, options: Mapping[str, Any] | None = None
) -> Recipe:
    """Combine a preset, a TOML recipe file and single options, later ones winning.

    Raises:
        RecipeError: unknown preset or key, value out of range, unreadable file.
    """
    fields: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise RecipeError(f"unknown preset {preset!r}; the known ones are {', '.join(PRESETS)}")
        fields |= PRESETS[preset]
    if path is not None:
        fields |= _read_toml(path)
    fields |= {key: value for key, value in (options or {}).items() if value is not None}
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not TOML: {error}") from error


def _explain(error: ValidationError) -> str:
    """One sentence per mistake; an unknown key is answered with the known ones."""
    parts = []
    for mistake in error.errors():
        where = ".".join(str(step) for step in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            known = SiteOverride.model_fields if where.startswith("sites.") else Recipe.model_fields
            parts.append(f"unknown recipe key {where!r}; the known ones are {', '.join(known)}")
        else:
            parts.append(f"{where} = {mistake['input']!r}: {mistake['msg'].lower()}")
    return "; ".join(parts)
