"""What a compiled file holds, from the file alone: the plan in its metadata, checked against its initializers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mptqc.analysis.bit_variables import TENSOR, Kind
from mptqc.analysis.budget import average_of
from mptqc.errors import ModelError, VerifyError
from mptqc.graph.compiled_file import load_compiled
from mptqc.graph.integer_sites import PRODUCTS_OF_AN_ATTENTION, IntegerSite, find_integer_sites
from mptqc.graph.match import find_linears, site_of
from mptqc.graph.quantized_tensors import QuantizedTensor, find_quantized_tensors
from mptqc.plan import ActivationQuantizer, MultiRegion, QuantPlan


@dataclass(frozen=True)
class OperandRow:
    """One quantized operand of an integer product, or one quantized tensor that is none (full coverage).

    Attributes:
        site: site id of the Linear, attention or tensor.
        kind: "linear", "attention" or "tensor".
        operand: "input" of a Linear; "q", "k", "p" (softmax output) or "v" of an attention; a tensor's kind.
        weight_bits: bits of the Linear's weight; None for all others.
        activation_bits: bits of the operand's codes.
        scale: Δ of the operand.
        zero_point: its zero point, as a code of `activation_bits` bits (multi-region: of the lowest region).
        quantizer: "uniform" or "multi-region".
        m: multi-region: the steps of the upper regions are 2^m·Δ; else None.
        split: multi-region: where they begin, in Δ; else None.
        low_codes: multi-region: codes of the lowest region; else None.
        alpha: migration strength of the smoothing folded into the norm before a Linear; None if there is none.
        weight_bytes: bytes of the weight's codes in the file; 0 for all others.
        trellis: whether a trellis codes the Linear's weight; None for all others.
        exponents: tensor: whether its channels have powers of two of their own; else None.
    """

    site: str
    kind: str
    operand: str
    weight_bits: int | None
    activation_bits: int
    scale: float
    zero_point: int
    quantizer: str
    m: tuple[int, ...] | None
    split: tuple[int, ...] | None
    low_codes: int | None
    alpha: float | None
    weight_bytes: int
    trellis: bool | None
    exponents: bool | None


@dataclass(frozen=True)
class Totals:
    """Sums over the file.

    Attributes:
        integer_linears: Linears that run in integers.
        integer_attentions: attentions whose two products run in integers.
        quantized_tensors: tensors that are no operands and yet quantized.
        float_linears: Linears that the plan leaves float.
        average_weight_bits: over all weights of integer Linears.
        average_activation_bits: over the elements of all quantized activations; with full coverage over operands and
            tensors, each counted once.
        budget_bytes: what the budget's arithmetic says the file takes; None where no bits were searched.
        weight_bytes: codes of all integer Linears.
        other_bytes: everything else in the file: scales, biases, float weights, the graph.
        file_bytes: the file and its external data.
    """

    integer_linears: int
    integer_attentions: int
    quantized_tensors: int
    float_linears: int
    average_weight_bits: float
    average_activation_bits: float
    weight_bytes: int
    other_bytes: int
    file_bytes: int
    budget_bytes: int | None


@dataclass(frozen=True)
class Inspection:
    """A compiled file: `target` names the operators it may use, `layers` its quantized operands in graph order."""

    target: str
    layers: tuple[OperandRow, ...]
    totals: Totals


def inspect_model(path: Path) -> Inspection:
    """Read a compiled model and check that its initializers are what its plan says.

    Raises:
        ModelError: no such file, not ONNX, not compiled by mptqc, or edited since.
    """
    model, plan = load_compiled(path)
    try:
        sites = find_integer_sites(model)
        tensors = find_quantized_tensors(model)
    except VerifyError as error:
        raise ModelError(f"{path}: {error}") from error
    layers = _layer_rows(sites, plan, path)
    rows = [*layers, *_attention_rows(sites, plan, path), *_tensor_rows(tensors, plan, path)]
    order = {site_of(node): position for position, node in enumerate(model.graph)}
    rows.sort(key=lambda row: order[row.site])
    weights = [found.weight for found in sites if found.weight is not None]
    weight_bytes = sum(row.weight_bytes for row in rows)
    file_bytes = _file_bytes(model, path)
    totals = Totals(
        integer_linears=len(layers),
        integer_attentions=len(plan.attentions),
        quantized_tensors=len(tensors),
        float_linears=len(find_linears(model)),
        average_weight_bits=sum(weight.bits * weight.integers.size for weight in weights)
        / max(sum(weight.integers.size for weight in weights), 1),
        average_activation_bits=_average_activation_bits(rows, plan),
        weight_bytes=weight_bytes,
        other_bytes=file_bytes - weight_bytes,
        file_bytes=file_bytes,
        budget_bytes=None if plan.path is None else plan.path.end_bytes,
    )
    return Inspection(plan.recipe.target.value, tuple(rows), totals)


def _average_activation_bits(rows: Sequence[OperandRow], plan: QuantPlan) -> float:
    """Each activation counts once, by its elements, however many Linears read it.

    A plan that knows no elements is averaged over its operands and tensors.
    """
    if not plan.elements:
        return sum(row.activation_bits for row in rows) / max(len(rows), 1)
    tensors = {tensor.site for tensor in plan.tensors}
    bits = {f"{row.site}/{TENSOR if row.site in tensors else row.operand}": row.activation_bits for row in rows}
    return average_of(plan.elements, bits, Kind.ACTIVATION)


def _layer_rows(sites: Sequence[IntegerSite], plan: QuantPlan, path: Path) -> list[OperandRow]:
    """A row for each planned Linear."""
    by_site = {found.site: found for found in sites}
    alphas = {fold.site: fold.alpha for fold in plan.norm_folds}
    rows = []
    for layer in plan.layers:
        found = by_site.get(layer.site)
        if found is None or found.weight is None:
            raise _edited(path, layer.site, "planned in integers", "not an integer product")
        if found.weight.bits != layer.weight_bits:
            raise _edited(
                path, layer.site, f"planned with {layer.weight_bits} bits", f"stored with {found.weight.bits}"
            )
        if (found.weight.trellis_codes is not None) != layer.trellis:
            planned, stored = ("with a trellis", "without one") if layer.trellis else ("without a trellis", "with one")
            raise _edited(path, layer.site, f"planned {planned}", f"stored {stored}")
        _check_scale(found.scales["input"], layer.input, layer.site, path)
        alpha = alphas.get(found.norm)
        row = _row(layer.site, "linear", "input", layer.input, layer.weight_bits, alpha, found.weight.stored_bytes)
        rows.append(replace(row, trellis=layer.trellis))
    return rows


def _attention_rows(sites: Sequence[IntegerSite], plan: QuantPlan, path: Path) -> list[OperandRow]:
    by_site = {found.site: found for found in sites}
    rows = []
    for planned in plan.attentions:
        found = by_site.get(planned.site)
        if found is None or found.products != PRODUCTS_OF_AN_ATTENTION:
            number = 0 if found is None else found.products
            raise _edited(path, planned.site, "planned as two integer products", f"{number} of them")
        for letter, quantizer in (("q", planned.q), ("k", planned.k), ("p", planned.p), ("v", planned.v)):
            _check_scale(found.scales[letter], quantizer, f"{planned.site} {letter}", path)
            rows.append(_row(planned.site, "attention", letter, quantizer, None, None, 0))
    return rows


def _tensor_rows(tensors: Sequence[QuantizedTensor], plan: QuantPlan, path: Path) -> list[OperandRow]:
    by_site = {found.site: found for found in tensors}
    rows = []
    for planned in plan.tensors:
        found = by_site.get(planned.site)
        if found is None:
            raise _edited(path, planned.site, "planned as a quantized tensor", "not quantized")
        # Powers of two are at least 1, and 1 for half of the channels.
        _check_scale(float(found.scale.min()), planned.quantizer, planned.site, path)
        row = _row(planned.site, "tensor", planned.kind.value, planned.quantizer, None, None, 0)
        rows.append(replace(row, exponents=planned.exponents))
    return rows


def _row(
    site: str,
    kind: str,
    operand: str,
    quantizer: ActivationQuantizer,
    weight_bits: int | None,
    alpha: float | None,
    weight_bytes: int,
) -> OperandRow:
    regions = quantizer if isinstance(quantizer, MultiRegion) else None
    return OperandRow(
        site=site,
        kind=kind,
        operand=operand,
        weight_bits=weight_bits,
        activation_bits=quantizer.bits,
        scale=quantizer.scale,
        zero_point=quantizer.zero_point,
        quantizer=quantizer.kind,
        m=tuple(region.m for region in regions.upper) if regions else None,
        split=regions.splits if regions else None,
        low_codes=regions.low_codes if regions else None,
        alpha=alpha,
        weight_bytes=weight_bytes,
        trellis=None,
        exponents=None,
    )


def _check_scale(stored: float, quantizer: ActivationQuantizer, where: str, path: Path) -> None:
    if np.float32(stored) != np.float32(quantizer.scale):
        raise _edited(path, where, f"planned with scale {quantizer.scale:.9g}", f"stored with {stored:.9g}")


def _file_bytes(model: ir.Model, path: Path) -> int:
    external = {
        Path(tensor.path)
        for value in model.graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    return path.stat().st_size + sum(file.stat().st_size for file in external)


def _edited(path: Path, site: str, planned: str, found: str) -> ModelError:
    return ModelError(f"{path}: {site} is {planned} but {found}; the file was edited after it was compiled")
