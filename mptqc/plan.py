"""What was decided: an immutable plan, keyed by site id, that alone rebuilds the compiled model.

On disk: `plan.json` (readable; scalars and bits) and `plan.safetensors` beside it (vectors and tensors).
"""

import hashlib
import json
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mptqc.errors import OutputError, PlanError
from mptqc.graph.files import write_together
from mptqc.recipe import Bits, Loss, Recipe, TensorKind
from mptqc.reference import trellis

PLAN_FORMAT = 1
PLAN_KEY = "mptqc.plan"
"""Where a compiled model keeps its plan's JSON (without arrays) in its metadata."""

UPPER_REGIONS = 3
"""Regions of OPT-m above the lowest, at most."""

Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Frozen(BaseModel):
    """Immutable, compared by value, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Uniform(Frozen):
    """x̂ = (clip(round(x/Δ) + z, 0, 2^k − 1) − z)·Δ."""

    kind: Literal["uniform"] = "uniform"
    bits: Bits
    scale: Scale
    zero_point: Annotated[int, Field(ge=0, le=255)]


class Region(NamedTuple):
    """One of the upper regions of OPT-m: `codes` codes of step 2^m·Δ."""

    m: Annotated[int, Field(ge=1, le=7)]
    codes: Annotated[int, Field(ge=1, le=255)]


class MultiRegion(Frozen):
    """OPT-m, of two regions as in the paper or of up to four: n₀ codes of step Δ, then nᵢ of each rising step 2^mᵢ·Δ.

    x̂ = Δ·clip(round(x/Δ), −z, T₁) + Σᵢ 2^mᵢ·Δ·(clip(round(x/(2^mᵢ·Δ)), jᵢ, jᵢ + nᵢ) − jᵢ)

    Regions meet at Tᵢ·Δ, Tᵢ = jᵢ·2^mᵢ: T₁ = n₀ − 1 − z, Tᵢ₊₁ = Tᵢ + nᵢ·2^mᵢ. All codes together are 2^k.
    """

    kind: Literal["multi-region"] = "multi-region"
    bits: Bits
    scale: Scale
    zero_point: Annotated[int, Field(ge=0, le=255)]
    low_codes: Annotated[int, Field(ge=1, le=255)]
    upper: Annotated[tuple[Region, ...], Field(min_length=1, max_length=UPPER_REGIONS)]

    @property
    def splits(self) -> tuple[int, ...]:
        """T₁, T₂, …: where each upper region begins, in units of Δ; a multiple of its 2^m."""
        steps = [region.codes * 2**region.m for region in self.upper]
        return tuple(accumulate(steps[:-1], initial=self.low_codes - 1 - self.zero_point))

    @property
    def top_code(self) -> int:
        """The largest code in units of Δ above the smallest; at most 255."""
        reach: int = self.low_codes - 1 + sum(region.codes * 2**region.m for region in self.upper)
        return reach


ActivationQuantizer = Annotated[Uniform | MultiRegion, Field(discriminator="kind")]


class LayerPlan(Frozen):
    """A Linear. Array `<site>/weight_scale` [N]; `<site>/weight_codes` if they are not the nearest ones.

    If `trellis`, the codes mean what `mptqc.reference.trellis` says, else each is its weight in units of the scale.
    """

    site: str
    weight_bits: Bits
    input: ActivationQuantizer
    trellis: bool = False

    def integers(self, codes: NDArray[np.int8]) -> NDArray[np.int8]:
        """What the product multiplies by: weights [K, N] in units of their scales, of their codes."""
        return trellis.decode(codes, self.weight_bits) if self.trellis else codes


class AttentionPlan(Frozen):
    """The operands of the two products of an attention."""

    site: str
    q: ActivationQuantizer
    k: ActivationQuantizer
    p: ActivationQuantizer
    v: ActivationQuantizer


class TensorPlan(Frozen):
    """A tensor that is no operand of a product.

    If `exponents`, x̂ = 2^e·Q(x/2^e) with the array `<site>/exponents` e [C] int8, the smallest of them 0.
    """

    site: str
    kind: TensorKind
    quantizer: ActivationQuantizer
    exponents: bool = False


class NormFold(Frozen):
    """SQ-b at one norm. Arrays `<site>/shift` and `<site>/scale`, [C]: x' = (x − shift)/scale."""

    site: str
    alpha: float


class GeluFold(Frozen):
    """A scale between GELU and the Linears that read it. Array `<site>/input_scale`, [K]: x' = x/scale.

    `site` is the first of those Linears.
    """

    site: str
    alpha: float


class AttentionFold(Frozen):
    """Folds through one attention. Arrays [heads·d]: `<site>/k_shift`, `/v_shift`, `/qk_scale`, `/v_scale`.

    k' = (k − k_shift)·qk_scale, q' = q/qk_scale, v' = (v − v_shift)/v_scale.
    """

    site: str


class Step(NamedTuple):
    """One step of the search for bits: one variable gets other bits.

    Attributes:
        variable: its position in `BitPath.variables`.
        bits: what it gets.
        loss: of the model after the step, on the scoring images, weights not compensated; None where it was not
            measured.
        accuracy: of the model after the step: top-1 on them, or agreement with float where they have no labels; None
            for a model without classes, and where it was not measured.
        bytes: of the file after the step.
    """

    variable: int
    bits: Bits
    loss: float | None
    accuracy: float | None
    bytes: int


class BitPath(Frozen):
    """The way that the search took from many bits to few; every point of it can be emitted.

    Attributes:
        variables: names, as in `QuantPlan.elements`.
        start: bits of each before the first step.
        steps: in order. The plan itself is the point after the last one.
        loss, accuracy, bytes: of the start, as in `Step`.
        end_bytes: bytes of the file after the last step.
        loss_kind: how outputs were compared.
    """

    variables: tuple[str, ...]
    start: tuple[Bits, ...]
    loss: float
    accuracy: float | None
    bytes: int
    end_bytes: int
    loss_kind: Loss
    steps: tuple[Step, ...] = ()

    def bits_after(self, steps: int) -> dict[str, int]:
        """Bits of every variable after so many steps."""
        bits = list(self.start)
        for step in self.steps[:steps]:
            bits[step.variable] = step.bits
        return dict(zip(self.variables, bits, strict=True))


class Refusal(Frozen):
    """A site that was left as it is, and why."""

    site: str
    what: str
    reason: str


class QuantPlan(Frozen):
    """The whole decision for one model; `arrays` holds its vectors, float32 or int8.

    `elements`: what the bits are averaged over (METHOD, Greedy MP): of `<site>/weight` the number of weights, of
    `<site>/input` and `<site>/q`, `/k`, `/p`, `/v` the elements per image; an input that several Linears share is
    named after the first. `path`: how the bits were found, where they were searched.
    """

    format: Literal[1] = PLAN_FORMAT  # type: ignore[assignment]
    model_digest: str
    recipe: Recipe
    norm_folds: tuple[NormFold, ...] = ()
    attention_folds: tuple[AttentionFold, ...] = ()
    gelu_folds: tuple[GeluFold, ...] = ()
    layers: tuple[LayerPlan, ...] = ()
    attentions: tuple[AttentionPlan, ...] = ()
    tensors: tuple[TensorPlan, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    elements: Mapping[str, int] = Field(default_factory=dict)
    path: BitPath | None = None
    preprocess: str | None = None
    arrays: Mapping[str, NDArray[np.generic]] = Field(default_factory=dict, exclude=True, repr=False)

    def with_arrays(self, arrays: Mapping[str, NDArray[np.generic]]) -> "QuantPlan":
        """A plan with these arrays added or replaced."""
        return self.model_copy(update={"arrays": {**self.arrays, **arrays}})

    def __eq__(self, other: object) -> bool:
        """Compare everything, arrays by dtype, shape and bytes (so that NaN equals itself)."""
        if not isinstance(other, QuantPlan) or self.arrays.keys() != other.arrays.keys():
            return False
        if self.model_dump() != other.model_dump():
            return False
        pairs = ((array, other.arrays[key]) for key, array in self.arrays.items())
        return all(
            one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes() for one, two in pairs
        )

    def array(self, key: str, shape: tuple[int, ...] | None = None) -> NDArray[np.float32]:
        """One float32 array, of this shape if one is given.

        Raises:
            PlanError: the plan has no such array, or it has another shape.
        """
        if key not in self.arrays:
            raise PlanError(f"the plan has no array {key!r}; its .safetensors file belongs to another plan")
        array = self.arrays[key].astype(np.float32, copy=False)
        if shape is not None and array.shape != shape:
            raise PlanError(
                f"the plan's array {key!r} has shape {array.shape}, the model needs {shape}; the plan belongs to "
                "another model"
            )
        return array

    def codes(self, site: str) -> NDArray[np.int8] | None:
        """The codes of a Linear's weight, if the plan has them."""
        found = self.arrays.get(f"{site}/weight_codes")
        return None if found is None else found.astype(np.int8, copy=False)

    def scales(self, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """One float32 array of scales.

        Raises:
            PlanError: as `array`, or a scale is not above zero.
        """
        array = self.array(key, shape)
        if not (np.isfinite(array) & (array > 0)).all():
            raise PlanError(f"the plan's array {key!r} holds scales that are not above zero; it is damaged")
        return array


def save_plan(plan: QuantPlan, path: Path) -> None:
    """Write `path` (JSON) and the `.safetensors` beside it; both whole or not at all.

    Raises:
        OutputError: the folder cannot be written, or `path` does not end in .json.
    """
    if path.suffix != ".json":
        raise OutputError(f"{path} is no name for a plan: give one that ends in .json; its arrays go beside it")
    tensors = save({key: np.ascontiguousarray(plan.arrays[key]) for key in sorted(plan.arrays)})
    content = {"arrays_sha256": hashlib.sha256(tensors).hexdigest(), **plan.model_dump(mode="json")}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    try:
        write_together({path: text.encode(), path.with_suffix(".safetensors"): tensors})
    except OSError as error:
        raise OutputError(f"cannot write the plan to {path}: {error.strerror}") from error


def load_plan(path: Path) -> QuantPlan:
    """Read a plan and its arrays.

    Raises:
        PlanError: a file is missing or damaged, or the two do not belong together.
    """
    beside = path.with_suffix(".safetensors")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = hashlib.sha256(beside.read_bytes()).hexdigest()
        arrays = load_file(beside)
    except OSError as error:
        raise PlanError(f"cannot read the plan: {error.filename}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise PlanError(f"the plan {path} is damaged: {error}") from error
    if not isinstance(content, dict) or "arrays_sha256" not in content:
        raise PlanError(f"{path} is not a plan written by mptqc (compile with --plan-out to get one)")
    if content.pop("arrays_sha256") != digest:
        raise PlanError(
            f"{beside.name} does not belong to {path.name}: its digest differs; keep the two files together"
        )
    try:
        plan = QuantPlan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise PlanError(f"the plan {path} is not valid at {where}: {first['msg'].lower()}") from error
    return plan.with_arrays(arrays)
