"""The flow, readable top to bottom: load, canonicalise, fold, search, emit.

`fold`, `emit` and `lower` need no data: from a canonical model and a plan to the compiled model. `compile_model` and
`apply_plan` both end in them, so that a plan rebuilds the same bytes.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import onnx_ir as ir

from mptqc.analysis.bit_variables import find_variables
from mptqc.analysis.compensate import compensate
from mptqc.analysis.fidelity import Fidelity, measure_fidelity
from mptqc.analysis.mixed_precision import allocate
from mptqc.analysis.observe import Progress
from mptqc.analysis.pareto import path_of, point_at
from mptqc.analysis.planner import float_layers, plan_folds, plan_quantizers
from mptqc.analysis.shapes import concrete_shapes
from mptqc.analysis.weights import with_trellis_codes
from mptqc.analysis.widths import at_bits, bits_of
from mptqc.data.augment import augmented
from mptqc.data.preprocess import METADATA_KEY
from mptqc.data.samples import Samples
from mptqc.errors import ModelError, PlanError, RecipeError
from mptqc.graph.compiled_file import load_compiled
from mptqc.graph.io import load_model, model_digest, serialize
from mptqc.graph.match import find_attentions, find_convolutions, find_linears
from mptqc.graph.tensors import find_tensors
from mptqc.graph.verify import check_onnx
from mptqc.passes.base import Stage, StageError, run_passes, stage_of
from mptqc.passes.canonicalise import canonicalise
from mptqc.passes.canonicalise_rotary import CanonicaliseRotary
from mptqc.passes.fold_affine import FoldAffine
from mptqc.passes.fold_attention import FoldAttention
from mptqc.passes.fold_gelu import FoldGelu
from mptqc.passes.fold_smoothing import FoldSmoothing
from mptqc.passes.join_heads import JoinHeads
from mptqc.passes.lower_to_cpu import LowerToCpu
from mptqc.passes.lower_to_native import LowerToNative
from mptqc.passes.lower_to_tensorrt import LowerToTensorRt
from mptqc.passes.mark_tensors import MarkTensors
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.part_gates import PartGates
from mptqc.passes.part_heads import PartHeads
from mptqc.passes.prune_tokens import PruneTokens
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.passes.quantize_tensors import QuantizeTensors
from mptqc.passes.rotate_heads import RotateHeads
from mptqc.passes.rotate_streams import RotateStreams
from mptqc.passes.scale_probabilities import ScaleProbabilities
from mptqc.passes.separate_projections import SeparateProjections
from mptqc.passes.set_biases import SetBiases
from mptqc.passes.stamp_sites import StampSites
from mptqc.passes.turn_unit_heads import TurnUnitHeads
from mptqc.passes.unfold_patches import UnfoldPatches
from mptqc.passes.use_float16 import UseFloat16
from mptqc.plan import PLAN_KEY, QuantPlan
from mptqc.recipe import Coverage, Recipe, Target
from mptqc.runtime.machine import saturates_here
from mptqc.runtime.session import PROVIDER_KEY

OBSERVED_IMAGES = 256
"""Images that folds and quantizers are searched on; compensation sees every view of every one."""


@dataclass(frozen=True)
class Compiled:
    """A compiled model, the plan that made it and, if it was compiled just now, how near it is to the float model."""

    model: ir.Model
    plan: QuantPlan
    fidelity: Fidelity | None = None


def silent(step: str, done: int, total: int) -> None:
    """A progress report that goes nowhere."""


def compile_model(
    path: Path,
    samples: Samples,
    recipe: Recipe,
    *,
    preprocess: str | None = None,
    convert_fp16: bool = False,
    executor: str = "in-process",
    checkpoint: Path | None = None,
    report: Progress = silent,
) -> Compiled:
    """Compile a float ONNX vision transformer to an integer one.

    Args:
        path: the float model.
        samples: calibration images, at most `recipe.samples` of them are used.
        recipe: what to do.
        preprocess: JSON of the preprocessing, kept in the model's metadata.
        convert_fp16: take a float16 model by converting it to float32 first.
        executor: where the search for bits measures, see `mptqc.runtime.executors`; does not change the result.
        checkpoint: a file from which an interrupted search for bits goes on.
        report: called with (step, done, total).

    Raises:
        ModelError: not a model that mptqc compiles.
        BudgetError: the recipe's budget cannot be kept.
        DataError: the samples do not fit the model.
        RecipeError: a pattern of its sites matches nothing, or this processor does not compute what it asks for.
    """
    report("canonicalise", 0, 1)
    check_arithmetic(recipe)
    model = load_canonical(path, convert_fp16=convert_fp16)
    check_site_patterns(model, recipe)
    plan = QuantPlan(
        model_digest=model_digest(path), recipe=recipe, preprocess=preprocess, refusals=float_layers(model)
    )
    rotate(model, recipe)
    views = views_of(samples, recipe)
    used = views.take(OBSERVED_IMAGES, recipe.seed)
    plan = plan_folds(model, concrete_shapes(model), used, plan, report)
    fold(model, plan)
    plan = plan_quantizers(model, concrete_shapes(model), used, plan, report)
    if recipe.budget is not None:

        def size_of(candidate: QuantPlan) -> int:
            return emitted_bytes(model, candidate)

        plan = allocate(
            model, marked(model), concrete_shapes(model), used, plan, quantize, size_of, report,
            executor=executor, checkpoint=checkpoint,
        )  # fmt: skip
    if recipe.compensation:
        plan = compensate(model, concrete_shapes(model), views, plan, quantize, report)
    prune(model)
    smoothed = ir.from_proto(ir.to_proto(model))
    emit(model, plan)
    report("compare with float", 0, 1)
    fidelity = measure_fidelity(smoothed, model, used, recipe.seed)
    lower(model, recipe)
    return Compiled(model, plan, fidelity)


def apply_plan(
    path: Path,
    plan: QuantPlan,
    *,
    convert_fp16: bool = False,
    at: float | None = None,
    samples: Samples | None = None,
    report: Progress = silent,
) -> Compiled:
    """Rebuild the compiled model from the float model and a plan; needs no data, gives the same bytes.

    Args:
        path: the float model.
        plan: complete.
        convert_fp16: as it was given to `compile_model`.
        at: average bits: emit the first point of the plan's path that keeps them, not the plan's own.
        samples: calibration images to compensate the weights of that point with; without them they are rounded.
        report: called with (step, done, total).

    Raises:
        PlanError: the plan was made for another model, or has no such point.
    """
    digest = model_digest(path)
    if digest != plan.model_digest:
        raise PlanError(
            f"the plan was made for another model: its digest is {plan.model_digest[:12]}…, that of {path} is "
            f"{digest[:12]}…; give the file that the plan was compiled from"
        )
    model = load_canonical(path, convert_fp16=convert_fp16)
    rotate(model, plan.recipe)
    fold(model, plan)
    if at is not None:
        plan = _at_point(model, plan, at, samples, report)
    prune(model)
    emit(model, plan)
    lower(model, plan.recipe)
    return Compiled(model, plan)


def _at_point(model: ir.Model, plan: QuantPlan, at: float, samples: Samples | None, report: Progress) -> QuantPlan:
    """The plan at another point of its path; at its own point it stays as it is."""
    shapes = concrete_shapes(model)
    variables = find_variables(model, shapes, plan.recipe)
    path, point = path_of(plan), point_at(plan, at)
    bits = path.bits_after(point.step)
    if bits == bits_of(plan, variables):
        return plan
    plan = at_bits(plan, variables, bits)
    plan = plan.model_copy(update={"path": path.model_copy(update={"end_bytes": point.bytes})})
    if samples is None or not plan.recipe.compensation:
        return plan
    return compensate(model, shapes, views_of(samples, plan.recipe), plan, quantize, report)


def views_of(samples: Samples, recipe: Recipe) -> Samples:
    """The images that the recipe asks for, in as many views."""
    taken = samples.take(recipe.samples, recipe.seed)
    return augmented(taken, recipe.views_of(len(taken)), recipe.seed)


def load_canonical(path: Path, *, convert_fp16: bool = False) -> ir.Model:
    """Read a float model and bring it to the canonical form, every site stamped.

    Raises:
        ModelError: not a model that mptqc compiles, or one without a transformer block.
    """
    model = canonicalise(load_model(path, convert_fp16=convert_fp16))
    if not find_attentions(model):
        raise ModelError(
            f"{path} has no transformer block: looked for softmax(q·k)·v, with q, k and v computed from the "
            f"image, and found none among {len(model.graph)} nodes "
            f"({len(find_convolutions(model))} of them convolutions). "
            "mptqc compiles vision transformers (ViT, DeiT, Swin, …); for a CNN use onnxruntime.quantization"
        )
    UnfoldPatches(concrete_shapes(model))(model)
    PartHeads(concrete_shapes(model), concrete_shapes(model, batch=2))(model)
    for make in (FoldAffine, CanonicaliseRotary, SeparateProjections, PartGates):
        make(concrete_shapes(model))(model)
    TurnUnitHeads()(model)
    JoinHeads(concrete_shapes(model, batch=2))(model)
    StampSites(concrete_shapes(model))(model)
    return model


def check_arithmetic(recipe: Recipe) -> None:
    """See that this processor computes the products that the recipe asks for exactly: compensation learns from them.

    Raises:
        RecipeError: codes of 8 bits are asked for, and their products would saturate here.
    """
    if not recipe.reduce_range and saturates_here():
        raise RecipeError(
            "reduce_range is off (--full-range), but this processor has AVX2 without VNNI: ONNX Runtime adds pairs of "
            "8-bit products in saturating 16 bits here, so neither compensation nor verification would see the sums of "
            "the processors that the model is for. Compile on a processor with VNNI, or leave reduce_range on"
        )


def check_site_patterns(model: ir.Model, recipe: Recipe) -> None:
    """See that every pattern of the recipe's `sites` names a site of the model.

    Raises:
        RecipeError: a pattern matches nothing.
    """
    known = [linear.site for linear in find_linears(model)]
    known += [attention.site for attention in find_attentions(model)]
    if recipe.coverage is Coverage.FULL:
        known += [tensor.site for tensor in find_tensors(model).found]
    for pattern in recipe.sites:
        if not any(fnmatchcase(site, pattern) for site in known):
            raise RecipeError(f"the recipe's site {pattern!r} matches no site; the model has {', '.join(known)}")


def rotate(model: ir.Model, recipe: Recipe) -> None:
    """Rotate the residual streams and heads of a canonical model, in place, if the recipe asks for it."""
    if recipe.rotation:
        for make in (RotateStreams, RotateHeads):
            make(recipe.seed, concrete_shapes(model))(model)


def fold(model: ir.Model, plan: QuantPlan) -> None:
    """Canonical to smoothed, in place."""
    shapes = concrete_shapes(model)
    run_passes(model, [FoldSmoothing(plan, shapes), FoldAttention(plan, shapes), FoldGelu(plan, shapes)])
    if plan.recipe.row_scale:
        ScaleProbabilities()(model)


def prune(model: ir.Model) -> None:
    """Leave out the tokens that nothing reads, in place.

    Only now: what the searches see of the last block would else be a single row of each image, and what they fit to
    so few rows does not hold for others.
    """
    PruneTokens(concrete_shapes(model))(model)


def quantize(model: ir.Model, plan: QuantPlan) -> None:
    """Make what the plan names run in integers, in place; the model stays at stage smoothed."""
    run_passes(model, [SetBiases(plan), QuantizeTensors(plan), QuantizeLinears(plan), QuantizeAttentions(plan)])


def marked(model: ir.Model) -> ir.Model:
    """A copy of a smoothed model whose tensors are marked, so that it can be quantized in pieces."""
    copy = ir.from_proto(ir.to_proto(model))
    MarkTensors()(copy)
    return copy


def emit(model: ir.Model, plan: QuantPlan) -> None:
    """Smoothed to quantized, in place: standard ONNX that knows its plan."""
    plan = with_trellis_codes(model, plan)
    quantize(model, plan)
    run_passes(model, [PackWeights(plan)])
    model.metadata_props[PLAN_KEY] = without_steps(plan).model_dump_json()
    if plan.preprocess is not None:
        model.metadata_props[METADATA_KEY] = plan.preprocess


def without_steps(plan: QuantPlan) -> QuantPlan:
    """The plan as the model carries it: the way to its bits is in the plan's own file only."""
    if plan.path is None:
        return plan
    return plan.model_copy(update={"path": plan.path.model_copy(update={"steps": ()})})


def emitted_bytes(model: ir.Model, plan: QuantPlan) -> int:
    """Bytes of the file that a smoothed model and a plan give; the model is not changed."""
    copy = ir.from_proto(ir.to_proto(model))
    prune(copy)
    emit(copy, plan)
    lower(copy, plan.recipe)
    return len(serialize(copy))


def lower(model: ir.Model, recipe: Recipe) -> None:
    """Quantized to the operators of the recipe's target, in place."""
    match recipe.target:
        case Target.PORTABLE:
            return
        case Target.CPU:
            LowerToCpu()(model)
        case Target.CPU_NATIVE | Target.CUDA:
            whole = recipe.target is Target.CPU_NATIVE
            LowerToNative(concrete_shapes(model), concrete_shapes(model, batch=2), whole)(model)
        case Target.TENSORRT:
            LowerToTensorRt()(model)
            check_onnx(model)
    if recipe.target is Target.CUDA:
        if recipe.float16:
            UseFloat16()(model)
        model.metadata_props[PROVIDER_KEY] = "cuda"


def lower_compiled(path: Path, target: Target, *, float16: bool = True) -> Compiled:
    """Lower a compiled portable file, with no float model and no plan but the one that the file carries.

    Raises:
        ModelError: not a file that `mptqc compile` wrote.
        StageError: it is lowered already.
    """
    model, plan = load_compiled(path)
    if stage_of(model) is not Stage.QUANTIZED:
        raise StageError(
            f"{path} was compiled for target {plan.recipe.target.value!r}; only a file of target 'portable' is "
            "lowered: give the one that it was made from, or compile with --target portable"
        )
    recipe = plan.recipe.model_copy(update={"target": target, "float16": plan.recipe.float16 and float16})
    plan = plan.model_copy(update={"recipe": recipe})
    lower(model, recipe)
    model.metadata_props[PLAN_KEY] = plan.model_dump_json()
    return Compiled(model, plan)
