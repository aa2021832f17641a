"""From observations to a plan: first the folds, then, on the folded model, every quantizer."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.bit_variables import find_variables, input_groups
from mptqc.analysis.gptq import Factor, gptq
from mptqc.analysis.observe import Observations, Progress, Rows, observe, origin
from mptqc.analysis.ranges import Search, attention_searches, linear_input_search
from mptqc.analysis.smoothing import Smoothing, plan_attention, plan_gelu, plan_norm
from mptqc.analysis.tensor_planner import plan_tensors
from mptqc.analysis.weights import (
    largest_scale,
    search_trellis_scale,
    search_weight_scale,
    second_moment,
    trellis_codes,
)
from mptqc.analysis.widths import at_bits, is_by_trellis, quantizer_array, without
from mptqc.data.samples import Samples
from mptqc.errors import RefusalError
from mptqc.graph.blocks import (
    Activation,
    Projections,
    attention_projections,
    find_activations,
    follows_gelu,
    norm_readers,
)
from mptqc.graph.edit import is_op
from mptqc.graph.match import (
    Attention,
    Linear,
    Norm,
    find_attentions,
    find_linears,
    find_norms,
    find_rms_norms,
    site_of,
)
from mptqc.graph.tensors import Tensors, find_tensors
from mptqc.plan import (
    AttentionFold,
    GeluFold,
    NormFold,
    QuantPlan,
    Refusal,
)
from mptqc.recipe import Allocator, Coverage, RangeMethod, Recipe, TensorKind

Shapes = dict[str, tuple[int, ...]]


def plan_folds(model: ir.Model, shapes: Shapes, samples: Samples, plan: QuantPlan, report: Progress) -> QuantPlan:
    """Add SQ-b and the attention folds to the plan, as far as its recipe asks for them.

    A norm or attention whose readers cannot be compensated is left alone and named in `plan.refusals`.
    """
    recipe = plan.recipe
    refusals = list(plan.refusals)
    norms = _foldable_norms(model, shapes, refusals) if recipe.smoothing else []
    attentions = _foldable_attentions(model, shapes, refusals) if recipe.attention_folds else []
    activations = _foldable_activations(model, shapes, refusals) if recipe.gelu_folds else []
    if not norms and not attentions and not activations:
        return plan.model_copy(update={"refusals": tuple(refusals)})
    values = [norm.output for norm, _ in norms] + [activation.output for activation in activations]
    for _, around in attentions:
        values += [linear.output for linear in (*(around.scores or ()), around.v)] + [around.proj.input]
    seen = observe(model, samples, values, [attention for attention, _ in attentions], shapes, recipe.seed, report)
    arrays: dict[str, NDArray[np.generic]] = {}
    norm_folds, attention_folds, gelu_folds = [], [], []
    for done, (norm, linears) in enumerate(norms):
        report("smooth norms", done, len(norms))
        bits = [recipe.bits_of(linear.site) for linear in linears]
        smoothing = plan_norm(
            seen.rows[str(norm.output.name)],
            [linear.weight for linear in linears],
            min(weight_bits for weight_bits, _ in bits),
            min(activation_bits for _, activation_bits in bits),
            recipe.alphas,
            recipe.seed,
            corrected=recipe.compensation,
        )
        if smoothing.alpha is not None:
            norm_folds.append(NormFold(site=norm.site, alpha=smoothing.alpha))
            arrays |= {f"{norm.site}/shift": smoothing.shift, f"{norm.site}/scale": smoothing.scale}
    for done, (attention, around) in enumerate(attentions):
        report("smooth attentions", done, len(attentions))
        found = _plan_attention(attention, around, seen, recipe)
        attention_folds.append(AttentionFold(site=attention.site))
        arrays |= {f"{attention.site}/{key}": array for key, array in found.items()}
    for done, activation in enumerate(activations):
        report("smooth GELUs", done, len(activations))
        scaling = _plan_gelu(activation, seen, recipe)
        if scaling.alpha is not None:
            gelu_folds.append(GeluFold(site=activation.site, alpha=scaling.alpha))
            arrays[f"{activation.site}/input_scale"] = scaling.scale
    return plan.model_copy(
        update={
            "norm_folds": tuple(norm_folds),
            "attention_folds": tuple(attention_folds),
            "gelu_folds": tuple(gelu_folds),
            "refusals": tuple(refusals),
        }
    ).with_arrays(arrays)


def _plan_gelu(activation: Activation, seen: Observations, recipe: Recipe) -> Smoothing:
    bits = [recipe.bits_of(linear.site) for linear in activation.linears]
    return plan_gelu(
        seen.rows[str(activation.output.name)],
        [linear.weight for linear in activation.linears],
        min(weight_bits for weight_bits, _ in bits),
        min(activation_bits for _, activation_bits in bits),
        recipe.seed,
        regions=recipe.most_regions,
        corrected=recipe.compensation,
    )


def _plan_attention(
    attention: Attention, around: Projections, seen: Observations, recipe: Recipe
) -> Mapping[str, NDArray[np.float32]]:
    v, context = (seen.rows[str(value.name)] for value in (around.v.output, around.proj.input))
    q, k = (None, None) if around.scores is None else (seen.rows[str(one.output.name)] for one in around.scores)
    bits = recipe.bits_of(attention.site)[1]
    return plan_attention(
        q, k, v, context, around.proj.weight, seen.slices[attention.site], bits, recipe.alphas,
        corrected=recipe.compensation,
    )  # fmt: skip


def float_layers(model: ir.Model) -> tuple[Refusal, ...]:
    """The convolutions and products that stay float: all but patch embeddings, Linears and those of attentions."""
    products = {linear.matmul for linear in find_linears(model)}
    for attention in find_attentions(model):
        products |= {attention.scores, attention.context}
    found: list[Refusal] = []
    for node in model.graph:
        if is_op(node, "Conv", "ConvTranspose"):
            reason = "only products are quantized; a convolution is one where it unfolds to disjoint patches"
        elif is_op(node, "MatMul", "Gemm", "Einsum") and node not in products:
            reason = "only products by constant weights [K, N] and those of softmax(q·k)·v are quantized"
        else:
            continue
        site = site_of(node) or str(node.name)
        found.append(Refusal(site=site, what="quantization", reason=f"{node.op_type} stays float: {reason}"))
    return tuple(found)


def _foldable_norms(model: ir.Model, shapes: Shapes, refusals: list[Refusal]) -> list[tuple[Norm, list[Linear]]]:
    found = []
    for norm in find_norms(model):
        try:
            linears = norm_readers(norm, model, shapes)
        except RefusalError as error:
            refusals.append(Refusal(site=norm.site, what="smoothing", reason=str(error)))
            continue
        if linears:
            found.append((norm, linears))
    reason = "it is an RMSNorm; only LayerNorms take scales and shifts up"
    refusals += [Refusal(site=str(node.name), what="smoothing", reason=reason) for node in find_rms_norms(model)]
    return found


def _foldable_attentions(
    model: ir.Model, shapes: Shapes, refusals: list[Refusal]
) -> list[tuple[Attention, Projections]]:
    found = []
    for attention in find_attentions(model):
        try:
            around = attention_projections(attention, model, shapes)
        except RefusalError as error:
            refusals.append(Refusal(site=attention.site, what="attention fold", reason=str(error)))
            continue
        if around.scores is None:
            refusals.append(Refusal(site=attention.site, what="fold of q and k", reason="their heads are rotated"))
        found.append((attention, around))
    return found


def _foldable_activations(model: ir.Model, shapes: Shapes, refusals: list[Refusal]) -> list[Activation]:
    found, refused = find_activations(model, shapes)
    refusals += [Refusal(site=name, what="GELU fold", reason=reason) for name, reason in refused]
    return found


def plan_quantizers(model: ir.Model, shapes: Shapes, samples: Samples, plan: QuantPlan, report: Progress) -> QuantPlan:
    """Add the quantizer of every Linear, attention and, for full coverage, tensor; `model` has the folds applied.

    With a budget each gets its most bits, and the plan's arrays hold the quantizers of all widths (`widths`).
    """
    recipe = plan.recipe
    full = recipe.coverage is Coverage.FULL
    linears, attentions = find_linears(model), find_attentions(model)
    tensors = find_tensors(model) if full else Tensors((), ())
    values = [linear.input for linear in linears]
    values += [tensor.value for tensor in tensors.found if tensor.kind is not TensorKind.SCORES]
    seen = observe(model, samples, values, attentions, shapes, recipe.seed, report, scores=full)
    variables = find_variables(model, shapes, recipe)
    widths = {variable.name: variable.widths for variable in variables}
    arrays: dict[str, NDArray[np.generic]] = {}
    moments: dict[str, NDArray[np.float32]] = {}
    factor: Factor | None = None
    compensated = recipe.budget is not None and recipe.allocator is Allocator.GREEDY_COMPENSATED
    for done, (site, group) in enumerate(input_groups(model, recipe).items()):
        report("search Linears", done, len(linears))
        search = _input_search(group, seen.rows[str(group[0].input.name)], shapes, recipe)
        arrays[f"{site}/input/quantizers"] = quantizer_array({bits: search(bits) for bits in widths[f"{site}/input"]})
    for done, linear in enumerate(linears):
        report("search weights", done, len(linears))
        name = str(linear.input.name)
        if (_scales_by_output(recipe) or compensated) and name not in moments:
            moments = {name: second_moment(seen.rows[name])}
            factor = Factor.of(moments[name].astype(np.float64)) if compensated else None
        for bits in widths[f"{linear.site}/weight"]:
            by_trellis = is_by_trellis(recipe, bits)
            scale = _weight_scale(linear, bits, recipe, moments.get(name))
            arrays[f"{linear.site}/weight_scale/{bits}"] = scale
            if factor is not None:
                codes = gptq(factor, linear.weight, scale, bits, by_trellis=by_trellis)
                arrays[f"{linear.site}/weight_codes/{bits}"] = codes
            elif by_trellis and not _searched_later(recipe):
                arrays[f"{linear.site}/weight_codes/{bits}"] = trellis_codes(linear.weight, scale, bits)
    for done, attention in enumerate(attentions):
        report("search attentions", done, len(attentions))
        searches = attention_searches(
            seen.slices[attention.site],
            recipe.range_method,
            regions=recipe.most_regions,
            seed=recipe.seed,
            corrected=recipe.compensation,
        )
        for operand, search in searches.items():
            name = f"{attention.site}/{operand}"
            arrays[f"{name}/quantizers"] = quantizer_array({bits: search(bits) for bits in widths[name]})
    planned_tensors = plan_tensors(model, tensors.found, seen, widths, recipe, report)
    arrays |= planned_tensors.quantizers
    plan = plan.with_arrays({**arrays, **planned_tensors.exponents})
    plan = plan.model_copy(update={"tensors": planned_tensors.tensors})
    most = {variable.name: variable.widths[-1] for variable in variables}
    planned = at_bits(plan, variables, most).model_copy(
        update={
            "elements": {variable.name: variable.elements for variable in variables},
            "refusals": plan.refusals + tensors.refusals,
        }
    )
    return planned if recipe.budget is not None else without(planned, arrays.keys())


def _input_search(group: Sequence[Linear], rows: Rows, shapes: Shapes, recipe: Recipe) -> Search:
    value = group[0].input
    after_gelu = follows_gelu(origin(value, shapes))
    weights = [linear.weight for linear in group]
    return linear_input_search(
        rows,
        weights,
        recipe.range_method,
        regions=recipe.most_regions if after_gelu else 1,
        corrected=recipe.compensation,
        seed=recipe.seed,
    )


def _scales_by_output(recipe: Recipe) -> bool:
    """True if weight scales are judged by output error; compensation searches scales of its own, after allocation."""
    return recipe.range_method is RangeMethod.OUTPUT and not _searched_later(recipe)


def _searched_later(recipe: Recipe) -> bool:
    """True if compensation finds scales and codes, and nothing before it needs them."""
    return recipe.compensation and recipe.budget is None


def _weight_scale(linear: Linear, bits: int, recipe: Recipe, moment: NDArray[np.float32] | None) -> NDArray[np.float32]:
    if _searched_later(recipe):
        return largest_scale(linear.weight, bits)
    if is_by_trellis(recipe, bits):
        counts = np.ones(len(linear.weight), np.float32) if moment is None else np.diag(moment)
        return search_trellis_scale(linear.weight, counts, bits)
    if recipe.range_method is RangeMethod.MIN_MAX:
        return largest_scale(linear.weight, bits)
    return search_weight_scale(linear.weight, bits, moment)
