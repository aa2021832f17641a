"""What the user asks for: a frozen recipe; unknown keys and values out of range are errors that name them."""

import tomllib
from collections.abc import Mapping
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    FULL = "full"


class TensorKind(StrEnum):
    """What a tensor that full coverage adds is; see METHOD, Full coverage."""

    NORM_INPUT = "norm-input"
    GELU_INPUT = "gelu-input"
    SCORES = "scores"
    PRODUCT_OUTPUT = "product-output"
    NORM_OUTPUT = "norm-output"
    SUM = "sum"


ACTIVATION_KINDS = ("input", "q", "k", "p", "v", *TensorKind)
"""What `BitLimits.kinds` may name: inputs of Linears, operands of attention, tensors of full coverage."""


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


class Allocator(StrEnum):
    """How bits are allocated to a budget; see METHOD, Greedy MP."""

    GREEDY = "greedy"
    GREEDY_COMPENSATED = "greedy-compensated"
    GREEDY_IN_PLACE = "greedy-in-place"
    EXACT = "exact"


class Loss(StrEnum):
    """How allocation compares outputs: relative squared error, or KL divergence of the softmax of logits."""

    OUTPUT = "output"
    KL = "kl"


class Budget(BaseModel):
    """What the compiled model may cost; each limit that is given holds. METHOD, Greedy MP defines the measures.

    Attributes:
        average_bits: of the weights, and of the activations.
        average_weight_bits: mean over weights, each Linear counting by its number of weights.
        average_activation_bits: mean over quantized activations, each tensor counting by its elements per image.
        max_bytes: of the file.
        max_bops: bit operations an image, the sum over products of multiplications x bits x bits.
        max_accuracy_drop: top-1 (without labels: agreement) that may be lost on the scoring images, 0..1; the
            smallest model found that holds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    average_bits: Annotated[float, Field(ge=2, le=8)] | None = None
    average_weight_bits: Annotated[float, Field(ge=2, le=8)] | None = None
    average_activation_bits: Annotated[float, Field(ge=2, le=8)] | None = None
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    max_bops: Annotated[float, Field(gt=0)] | None = None
    max_accuracy_drop: Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _limits_something(self) -> "Budget":
        given = [name for name, limit in self if limit is not None]
        if not given:
            raise ValueError(f"a budget needs a limit: one of {', '.join(Budget.model_fields)}")
        if self.max_accuracy_drop is not None and len(given) > 1:
            raise ValueError("max_accuracy_drop looks for the smallest model that holds it; give no other limit")
        return self

    @property
    def weight_average(self) -> float | None:
        """The average that the weights must keep, if one is given."""
        return _least(self.average_bits, self.average_weight_bits)

    @property
    def activation_average(self) -> float | None:
        """The average that the activations must keep, if one is given."""
        return _least(self.average_bits, self.average_activation_bits)


def _least(*limits: float | None) -> float | None:
    return min((limit for limit in limits if limit is not None), default=None)


class BitLimits(BaseModel):
    """The fewest and the most bits that allocation may give.

    Attributes:
        weight: of weights.
        activation: of all activations that `kinds` does not name.
        kinds: of one kind of activation: input (of a Linear), q, k, p (probabilities), v, or a `TensorKind`; e.g.
            {"p": [4, 8], "norm-input": [6, 8]}.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: tuple[Bits, Bits] = (2, 8)
    activation: tuple[Bits, Bits] = (3, 8)
    kinds: Mapping[str, tuple[Bits, Bits]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _in_order(self) -> "BitLimits":
        for kind, (least, most) in {"weight": self.weight, "activation": self.activation, **self.kinds}.items():
            if least > most:
                raise ValueError(f"bit_limits.{kind} = [{least}, {most}]: the fewest bits come first")
        for kind in self.kinds:
            if kind not in ACTIVATION_KINDS:
                raise ValueError(f"bit_limits.kinds: no activation is a {kind!r}; known: {', '.join(ACTIVATION_KINDS)}")
        return self

    def of_activation(self, kind: str) -> tuple[int, int]:
        """Those of one kind of activation."""
        return self.kinds.get(kind, self.activation)


class Recipe(BaseModel):
    """Every choice that changes the compiled model.

    Attributes:
        weight_bits: bits of every Linear's weight, 2..8.
        activation_bits: bits of every quantized activation, 2..8.
        end_bits: bits (weights and activations) of the patch embedding and the head.
        trellis: weights of 2 to 5 bits are coded by a trellis: nearer to what they should be in a file of the same
            size; takes longer to compile, and some more to load.
        reduce_range: weights, k and v never get more than 7 bits, so that pairs of products fit 16 bits: exact on every
            processor. Where ONNX Runtime finds AVX2 and no VNNI, it adds pairs of uint8 × int8 in saturating 16 bits.
        coverage: which tensors are quantized.
        stream_exponents: with full coverage, per-channel powers of two compete for the tensors that norms read.
        target: operators the emitted model may use.
        samples: calibration images used, at most.
        views: augmented views made of each calibration image, the image itself included; 1 makes none.
        pictures: images and views together that are enough: many images get fewer views; None: `views` of each.
        seed: seed of every random choice.
        range_method: how activation ranges are found.
        rotation: rotation of the residual streams and of the heads, seeded by `seed`.
        smoothing: SQ-b, scale and shift folded through LayerNorm.
        alphas: migration strengths tried per norm by SQ-b.
        opt_m: quantizers of several regions for post-GELU and post-softmax tensors.
        regions: the most regions that they may have; the paper's OPT-m has 2.
        attention_folds: K and V shifts, q/k and v/proj scales.
        row_scale: attention probabilities are quantized relative to the largest of their row.
        gelu_folds: a scale per channel between GELU and the Linear that reads it.
        float16: what stays float between the operators runs in float16, with target cuda.
        compensation: sequential ridge, GPTQ and bias refit of every Linear.
        sites: overrides by site pattern (shell wildcards), the last match wins, e.g.
            {"block0?.fc2": {"activation_bits": 8}}; with a budget these bits are fixed, and count.
        budget: what the model may cost; every layer's bits are then allocated, the patch embedding's and head's too,
            and `weight_bits`, `activation_bits` and `end_bits` hold only for what the budget leaves free.
        allocator: how bits are allocated to the budget.
        loss: how allocation compares the outputs of choices of bits; always `output` where they are no logits.
        bit_limits: the fewest and the most bits that allocation may give.
        scoring_images: calibration images on which allocation measures a loss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: Bits = 8
    activation_bits: Bits = 8
    end_bits: Bits = 8
    trellis: bool = False
    reduce_range: bool = True
    coverage: Coverage = Coverage.PARTIAL
    stream_exponents: bool = True
    target: Target = Target.PORTABLE
    samples: Annotated[int, Field(ge=1)] = 64
    views: Annotated[int, Field(ge=1, le=16)] = 1
    pictures: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    range_method: RangeMethod = RangeMethod.OUTPUT
    rotation: bool = False
    smoothing: bool = True
    alphas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.5, 0.7, 0.85, 1.0)
    opt_m: bool = True
    regions: Annotated[int, Field(ge=2, le=4)] = 3
    attention_folds: bool = True
    row_scale: bool = True
    gelu_folds: bool = True
    float16: bool = True
    compensation: bool = True
    sites: Mapping[str, SiteOverride] = Field(default_factory=dict)
    budget: Budget | None = None
    allocator: Allocator = Allocator.GREEDY
    loss: Loss = Loss.OUTPUT
    bit_limits: BitLimits = Field(default_factory=BitLimits)
    scoring_images: Annotated[int, Field(ge=2)] = 32

    @property
    def most_regions(self) -> int:
        """Of the quantizer of a post-GELU or post-softmax tensor; 1 if it is uniform."""
        return self.regions if self.opt_m else 1

    def views_of(self, images: int) -> int:
        """How many views each of so many images gets."""
        return self.views if self.pictures is None else max(1, min(self.views, self.pictures // images))

    def bits_of(self, site: str) -> tuple[int, int]:
        """(weight bits, activation bits) of a site after overrides; with a budget its averages, as a first guess."""
        at_an_end = site.startswith(("patch_embed", "head"))
        weight_bits, activation_bits = (self.end_bits,) * 2 if at_an_end else (self.weight_bits, self.activation_bits)
        if self.budget is not None:
            weight_bits = round(self.budget.weight_average or weight_bits)
            activation_bits = round(self.budget.activation_average or activation_bits)
        fixed = self.fixed_bits_of(site)
        return fixed.weight_bits or weight_bits, fixed.activation_bits or activation_bits

    def fixed_bits_of(self, site: str) -> SiteOverride:
        """What `sites` says of a site; None where it says nothing."""
        weight_bits, activation_bits = None, None
        for pattern, override in self.sites.items():
            if fnmatchcase(site, pattern):
                weight_bits = override.weight_bits or weight_bits
                activation_bits = override.activation_bits or activation_bits
        return SiteOverride(weight_bits=weight_bits, activation_bits=activation_bits)


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        f"w{weight}a{activation}": MappingProxyType(
            {"weight_bits": weight, "activation_bits": activation, "trellis": trellis}
        )
        for weight, activation, trellis in (
            (8, 8, False), (6, 6, False), (5, 5, False), (4, 4, False), (3, 3, False),
            (6, 8, False), (4, 8, True), (3, 8, True), (2, 8, True),
        )
    }
)  # fmt: skip
"""Papers give activations as many bits as weights. The last four are those to deploy: fewer bits of activations make a
file neither smaller nor faster."""


class Effort(StrEnum):
    """How much work is put into accuracy; see EFFORTS."""

    FAST = "fast"
    BALANCED = "balanced"
    BEST = "best"


EFFORTS: Mapping[Effort, Mapping[str, Any]] = MappingProxyType(
    {
        Effort.FAST: MappingProxyType({"samples": 64, "views": 1}),
        Effort.BALANCED: MappingProxyType({"samples": 512, "views": 4, "pictures": 512}),
        Effort.BEST: MappingProxyType({"samples": 2048, "views": 4, "pictures": 2048, "regions": 4}),
    }
)
"""What each effort asks for; a preset, a recipe file and single options win over it."""


def make_recipe(
    preset: str | None = None,
    path: Path | None = None,
    options: Mapping[str, Any] | None = None,
    effort: str | None = None,
) -> Recipe:
    """Combine an effort, a preset, a TOML recipe file and single options, later ones winning.

    Raises:
        RecipeError: unknown effort, preset or key, value out of range, unreadable file.
    """
    fields: dict[str, Any] = {}
    if effort is not None:
        if effort not in tuple(Effort):
            raise RecipeError(f"unknown effort {effort!r}; the known ones are {', '.join(Effort)}")
        fields |= EFFORTS[Effort(effort)]
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
            inner: dict[str, type[BaseModel]] = {"sites": SiteOverride, "budget": Budget, "bit_limits": BitLimits}
            known = inner.get(where.partition(".")[0], Recipe).model_fields
            parts.append(f"unknown recipe key {where!r}; the known ones are {', '.join(known)}")
        else:
            parts.append(f"{where} = {mistake['input']!r}: {mistake['msg'].lower()}")
    return "; ".join(parts)
