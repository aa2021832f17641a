"""What a compiled file holds, from the file alone: the plan in its metadata, checked against its initializers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from mptqc.errors import ModelError, VerifyError
from mptqc.graph.edit import constant_of, is_op
from mptqc.graph.integer_products import IntegerProduct, find_integer_products, find_sources, stored_weight
from mptqc.graph.layout import MOVEMENT_OPS
from mptqc.graph.match import find_linears, site_of
from mptqc.plan import PLAN_KEY, ActivationQuantizer, QuantPlan, TwoRegion


@dataclass(frozen=True)
class OperandRow:
    """One quantized operand of an integer product.

    Attributes:
        site: site id of the Linear or attention.
        kind: "linear" or "attention".
        operand: "input" of a Linear; "q", "k", "p" (softmax output) or "v" of an attention.
        weight_bits: bits of the Linear's weight; None for an attention.
        activation_bits: bits of the operand's codes.
        scale: Δ of the operand.
        zero_point: its zero point, as a code of `activation_bits` bits (two-region: of the low region).
        quantizer: "uniform" or "two-region".
        m: two-region: the coarse step is 2^m·Δ; else None.
        split: two-region: the regions meet at split·Δ; else None.
        low_codes: two-region: codes of the fine region; else None.
        alpha: migration strength of the smoothing folded into the norm before a Linear; None if there is none.
        weight_bytes: bytes of the weight's codes in the file; 0 for an attention.
    """

    site: str
    kind: str
    operand: str
    weight_bits: int | None
    activation_bits: int
    scale: float
    zero_point: int
    quantizer: str
    m: int | None
    split: int | None
    low_codes: int | None
    alpha: float | None
    weight_bytes: int


@dataclass(frozen=True)
class Totals:
    """Sums over the file.

    Attributes:
        integer_linears: Linears that run in integers.
        integer_attentions: attentions whose two products run in integers.
        float_linears: Linears that the plan leaves float.
        average_weight_bits: over all weights of integer Linears.
        average_activation_bits: over all quantized operands.
        weight_bytes: codes of all integer Linears.
        other_bytes: everything else in the file: scales, biases, float weights, the graph.
        file_bytes: the file and its external data.
    """

    integer_linears: int
    integer_attentions: int
    float_linears: int
    average_weight_bits: float
    average_activation_bits: float
    weight_bytes: int
    other_bytes: int
    file_bytes: int


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
    model = _read(path)
    plan = _plan_of(model, path)
    try:
        products = find_integer_products(model)
        layers, weights = _layer_rows(products, plan, path)
        rows = [*layers, *_attention_rows(products, plan, path)]
    except VerifyError as error:
        raise ModelError(f"{path}: {error}") from error
    order = {product.site: position for position, product in enumerate(products)}
    rows.sort(key=lambda row: order[row.site])
    weight_bytes = sum(row.weight_bytes for row in rows)
    file_bytes = _file_bytes(model, path)
    totals = Totals(
        integer_linears=len(layers),
        integer_attentions=len(plan.attentions),
        float_linears=len(find_linears(model)),
        average_weight_bits=sum(bits * size for bits, size in weights) / max(sum(size for _, size in weights), 1),
        average_activation_bits=float(np.mean([row.activation_bits for row in rows])) if rows else 0.0,
        weight_bytes=weight_bytes,
        other_bytes=file_bytes - weight_bytes,
        file_bytes=file_bytes,
    )
    return Inspection(plan.recipe.target.value, tuple(rows), totals)


def _read(path: Path) -> ir.Model:
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give the path of a compiled .onnx file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"{path} is not an ONNX model, or it is truncated; give a compiled .onnx file") from error
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent.resolve())
    return model


def _plan_of(model: ir.Model, path: Path) -> QuantPlan:
    content = model.metadata_props.get(PLAN_KEY)
    if content is None:
        raise ModelError(
            f"{path} was not compiled by mptqc (its metadata has no {PLAN_KEY}), so there is nothing to inspect; give "
            "the output of mptqc compile"
        )
    try:
        return QuantPlan.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise ModelError(
            f"{path} holds a plan that this version of mptqc cannot read (at {where}: {first['msg'].lower()}); compile "
            "the model again"
        ) from error


def _layer_rows(
    products: Sequence[IntegerProduct], plan: QuantPlan, path: Path
) -> tuple[list[OperandRow], list[tuple[int, int]]]:
    """A row for each Linear, and (bits, number of weights) of each."""
    by_site = {product.site: product for product in products if product.is_linear}
    alphas = {fold.site: fold.alpha for fold in plan.norm_folds}
    rows, weights = [], []
    for layer in plan.layers:
        product = by_site.get(layer.site)
        if product is None:
            raise _edited(path, layer.site, "planned in integers", "not an integer product")
        weight = stored_weight(product)
        if weight.bits != layer.weight_bits:
            raise _edited(path, layer.site, f"planned with {layer.weight_bits} bits", f"stored with {weight.bits}")
        _check_scale(product.left_scale, layer.input, layer.site, path)
        norm = _norm_above(product)
        rows.append(
            _row(layer.site, "linear", "input", layer.input, layer.weight_bits, alphas.get(norm), weight.stored_bytes)
        )
        weights.append((weight.bits, weight.codes.size))
    return rows, weights


def _attention_rows(products: Sequence[IntegerProduct], plan: QuantPlan, path: Path) -> list[OperandRow]:
    by_site: dict[str, list[IntegerProduct]] = {}
    for product in products:
        if not product.is_linear:
            by_site.setdefault(product.site, []).append(product)
    rows = []
    for planned in plan.attentions:
        pair = by_site.get(planned.site, [])
        if len(pair) != 2:
            raise _edited(path, planned.site, "planned as two integer products", f"{len(pair)} of them")
        scores, context = pair
        operands: Mapping[str, tuple[ActivationQuantizer, ir.Value]] = {
            "q": (planned.q, scores.left_scale),
            "k": (planned.k, scores.right_scale),
            "p": (planned.p, context.left_scale),
            "v": (planned.v, context.right_scale),
        }
        for letter, (quantizer, scale) in operands.items():
            _check_scale(scale, quantizer, f"{planned.site} {letter}", path)
            rows.append(_row(planned.site, "attention", letter, quantizer, None, None, 0))
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
    two_region = quantizer if isinstance(quantizer, TwoRegion) else None
    return OperandRow(
        site=site,
        kind=kind,
        operand=operand,
        weight_bits=weight_bits,
        activation_bits=quantizer.bits,
        scale=quantizer.scale,
        zero_point=quantizer.zero_point,
        quantizer=quantizer.kind,
        m=two_region.m if two_region else None,
        split=two_region.split if two_region else None,
        low_codes=two_region.low_codes if two_region else None,
        alpha=alpha,
        weight_bytes=weight_bytes,
    )


def _check_scale(value: ir.Value, quantizer: ActivationQuantizer, where: str, path: Path) -> None:
    stored = constant_of(value)
    if stored is None or np.float32(stored) != np.float32(quantizer.scale):
        raise _edited(path, where, f"planned with scale {quantizer.scale:.9g}", f"stored with {stored}")


def _norm_above(product: IntegerProduct) -> str:
    """The site of the LayerNormalization whose output the Linear quantizes, or an empty string."""
    value: ir.Value | None = find_sources(product.left)[0].x
    node = None if value is None else value.producer()
    while node is not None and is_op(node, *MOVEMENT_OPS):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return site_of(node) if node is not None and is_op(node, "LayerNormalization") else ""


def _file_bytes(model: ir.Model, path: Path) -> int:
    external = {
        Path(tensor.path)
        for value in model.graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    return path.stat().st_size + sum(file.stat().st_size for file in external)


def _edited(path: Path, site: str, planned: str, found: str) -> ModelError:
    return ModelError(f"{path}: {site} is {planned} but {found}; the file was edited after it was compiled")
