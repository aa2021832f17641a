"""Does a compiled model do in ONNX Runtime what its plan says? Counted after graph optimization, compared with numpy.

Two questions:
1. After ONNX Runtime's own graph optimization, is every planned product one operator that multiplies integers?
2. On one batch, site by site: do the codes equal `reference.quantize` of the very floats that were quantized, and does
   the product equal the exact integer sum, scaled in float32? Likewise tensor by tensor, where coverage is full.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.cpu_form import cpu_form
from mptqc.analysis.site_check import EPSILON, SiteCheck, Values
from mptqc.analysis.verify_native import check_native_numbers, check_native_weights
from mptqc.analysis.verify_tensors import check_tensors
from mptqc.errors import VerifyError
from mptqc.graph.edit import constant_of
from mptqc.graph.integer_products import (
    IntegerProduct,
    QuantizerSource,
    find_integer_products,
    find_sources,
    stored_weight,
)
from mptqc.graph.native_nodes import native_nodes
from mptqc.graph.verify import check_structure
from mptqc.plan import ActivationQuantizer, QuantPlan
from mptqc.reference.quantizers import dequantize, integer_linear, quantize
from mptqc.runtime.fused_ops import INTEGER_MATMULS, graph_op_counts, matmul_counts
from mptqc.runtime.machine import saturates_here
from mptqc.runtime.session import create_session

logger = logging.getLogger(__name__)

# Each side rounds four times in float32: scale · scale, the sum to float32, sum · scale, + bias; each error is at most
# half an EPSILON of |sum · scale| + |bias|.
ROUNDINGS = 4
FUSED_OP = "MatMulIntegerToFloat"
GROUP_PRODUCTS = 16


@dataclass(frozen=True)
class VerifyReport:
    """What was checked; it exists only if everything passed.

    Attributes:
        op_counts: operators after ONNX Runtime's graph optimization.
        integer_products: products that run in integers (Linears + 2 · attentions).
        float_products: products that still run in floats: those that the plan leaves float.
        sites: one entry per product, in graph order.
        tensors: one entry per quantized tensor that is no operand (full coverage), in graph order.
        worst: site with the largest error (relative to its tolerance).
    """

    op_counts: Mapping[str, int]
    integer_products: int
    float_products: int
    sites: tuple[SiteCheck, ...]
    tensors: tuple[SiteCheck, ...]
    worst: str


def verify_compiled(model: ir.Model | Path | str, plan: QuantPlan, batch: NDArray[np.float32]) -> VerifyReport:
    """Check structure, operators and numbers of a compiled model.

    Args:
        model: the compiled model, or its file.
        plan: what it was compiled from.
        batch: images as the model takes them; one is enough.

    Raises:
        VerifyError: a planned site is missing, does not run in integers, or gives other numbers than the reference;
            the sites are named.
    """
    compiled = model if isinstance(model, ir.Model) else ir.load(model)
    check_structure(compiled, plan)
    products = find_integer_products(compiled)
    proto = cpu_form(compiled)
    native = native_nodes(compiled)
    _check_weights(products, plan)
    check_native_weights(native, plan)
    counts, makers = _optimized(proto)
    _check_operators(counts, makers, products, _products_of(native))
    fused = {str(product.output.name) for product in products if makers.get(str(product.output.name)) == FUSED_OP}
    checks = _check_numbers(proto, products, _quantizers(products, plan), batch, fused)
    checks += check_native_numbers(native, plan, lambda names: _values(proto, names, batch))
    tensors = check_tensors(compiled, plan, lambda names: _values(proto, names, batch))
    _raise_if_wrong(checks, "integer products")
    _raise_if_wrong(tensors, "quantized tensors")
    worst = max(checks, key=lambda check: check.error, default=None)
    found = matmul_counts(counts)
    report = VerifyReport(
        counts,
        found.integer_matmuls,
        found.float_matmuls,
        tuple(checks),
        tuple(tensors),
        "" if worst is None else worst.site,
    )
    slow = [check.site for check in checks if not check.fused]
    if slow:
        logger.warning("%d products run as MatMulInteger, unfused and slower: %s", len(slow), ", ".join(slow[:5]))
    logger.info("verified %d integer products, worst site %s", len(checks), report.worst)
    return report


def _check_weights(products: Sequence[IntegerProduct], plan: QuantPlan) -> None:
    """The scales, and the codes where the plan has them, are the planned ones."""
    layers = {layer.site: layer for layer in plan.layers}
    for product in products:
        if not product.is_linear:
            continue
        codes, layer = plan.codes(product.site), layers[product.site]
        scale = plan.array(f"{product.site}/weight_scale")
        if not np.array_equal(_array(product.right_scale), scale):
            raise VerifyError(
                f"{product.site}: the weight scales in the model are not those of the plan; compile again"
            )
        if codes is not None and not np.array_equal(stored_weight(product).integers, layer.integers(codes)):
            raise VerifyError(f"{product.site}: the weight codes in the model are not those of the plan; compile again")


def _optimized(proto: onnx.ModelProto) -> tuple[dict[str, int], dict[str, str]]:
    """Operator counts after graph optimization, and the operator that makes each value."""
    serialized: bytes = proto.SerializeToString()  # type: ignore[no-untyped-call]  # protobuf has no types
    with tempfile.TemporaryDirectory(prefix="mptqc-") as folder:
        path = Path(folder) / "optimized.onnx"
        create_session(serialized, threads=1, optimized_path=path)
        graph = onnx.load(path, load_external_data=False).graph
    return graph_op_counts(graph), {name: node.op_type for node in graph.node for name in node.output}


def _products_of(native: Sequence[ir.Node]) -> int:
    """How many products the operators of `ai.mptqc` stand for."""
    return matmul_counts(Counter(f"{node.domain}.{node.op_type}" for node in native)).integer_matmuls


def _check_operators(
    counts: Mapping[str, int], makers: Mapping[str, str], products: Sequence[IntegerProduct], native_products: int
) -> None:
    found = matmul_counts(counts).integer_matmuls
    nbits = counts.get("MatMulNBits", 0)
    planned = len(products) + native_products
    if found == planned and not nbits:
        return
    in_floats = [
        product.site
        for product in products
        if makers.get(str(product.output.name)) not in INTEGER_MATMULS
        and makers.get(str(product.node.outputs[0].name)) not in INTEGER_MATMULS
    ]
    raise VerifyError(
        f"ONNX Runtime runs {found} of {planned} planned products in integers (MatMulNBits: {nbits}); not in "
        f"integers: {', '.join(in_floats[:5]) or 'none that can be named'}"
    )


def _quantizers(products: Sequence[IntegerProduct], plan: QuantPlan) -> list[tuple[ActivationQuantizer, ...]]:
    """The planned quantizers of each product's operands: one for a Linear, two for a product of an attention."""
    layers = {layer.site: layer for layer in plan.layers}
    attentions = {attention.site: attention for attention in plan.attentions}
    seen: set[str] = set()
    found: list[tuple[ActivationQuantizer, ...]] = []
    for product in products:
        if product.is_linear:
            found.append((layers[product.site].input,))
            continue
        planned = attentions[product.site]
        found.append((planned.p, planned.v) if product.site in seen else (planned.q, planned.k))
        seen.add(product.site)
    return found


@dataclass(frozen=True)
class _Probe:
    """A product, and the values of the model that tell whether it is right."""

    product: IntegerProduct
    quantizers: tuple[ActivationQuantizer, ...]
    sources: tuple[tuple[QuantizerSource, ...], ...]

    @property
    def names(self) -> list[str]:
        values = [self.product.left, self.product.output]
        if not self.product.is_linear:
            values.append(self.product.right)
        for sources in self.sources:
            for source in sources:
                values += [source.codes] if source.x is None else [source.x, source.codes]
        return list(dict.fromkeys(str(value.name) for value in values))


def _check_numbers(
    proto: onnx.ModelProto,
    products: Sequence[IntegerProduct],
    quantizers: Sequence[tuple[ActivationQuantizer, ...]],
    batch: NDArray[np.float32],
    fused: set[str],
) -> list[SiteCheck]:
    probes = []
    for product, planned in zip(products, quantizers, strict=True):
        operands = (product.left,) if product.is_linear else (product.left, product.right)
        probes.append(_Probe(product, planned, tuple(tuple(find_sources(operand)) for operand in operands)))
    checks: list[SiteCheck] = []
    for start in range(0, len(probes), GROUP_PRODUCTS):
        group = probes[start : start + GROUP_PRODUCTS]
        seen = _values(proto, [name for probe in group for name in probe.names], batch)
        checks += [_check(probe, seen, fused) for probe in group]
    return checks


def _values(proto: onnx.ModelProto, names: Sequence[str], batch: NDArray[np.float32]) -> Values:
    """The named values on one batch; a session for each call, since ONNX Runtime keeps every output to the end."""
    graph_input = proto.graph.input[0].name
    wanted = [name for name in dict.fromkeys(names) if name != graph_input]
    probing = onnx.ModelProto()
    probing.CopyFrom(proto)  # type: ignore[no-untyped-call]  # protobuf has no types
    del probing.graph.output[:]
    probing.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    serialized: bytes = probing.SerializeToString()  # type: ignore[no-untyped-call]  # protobuf has no types
    found = create_session(serialized, threads=1).run(wanted, {graph_input: batch})
    return {graph_input: batch, **{name: np.asarray(value) for name, value in zip(wanted, found, strict=True)}}


def _check(probe: _Probe, seen: Values, fused: set[str]) -> SiteCheck:
    product = probe.product
    zeros = [_number(product.left_zero), _number(product.right_zero)]
    compared = mismatches = 0
    for quantizer, sources, zero in zip(probe.quantizers, probe.sources, zeros, strict=False):
        for source in sources:
            if source.x is None:
                continue  # made by an operator of ai.mptqc, which is checked by itself
            codes = seen[str(source.codes.name)].astype(np.int32) - zero
            expected = quantize(quantizer, seen[str(source.x.name)].astype(np.float32)) - quantizer.zero_point
            mismatches += int((codes != expected).sum())
            compared += codes.size
    left = seen[str(product.left.name)].astype(np.int32) - zeros[0]
    output = seen[str(product.output.name)].astype(np.float32)
    expected_output, magnitude = _expected(product, probe.quantizers, left, seen, zeros[1])
    allowed = ROUNDINGS * EPSILON * magnitude + np.finfo(np.float32).tiny
    error = float((np.abs(output - expected_output) / allowed).max(initial=0))
    return SiteCheck(
        product.site, str(product.node.name), mismatches, compared, error, str(product.output.name) in fused
    )


def _expected(
    product: IntegerProduct,
    quantizers: tuple[ActivationQuantizer, ...],
    left: NDArray[np.int32],
    seen: Values,
    right_zero: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the product must give, and the magnitude that its rounding errors are relative to."""
    if product.is_linear:
        codes = stored_weight(product).integers
        scale, bias = _array(product.right_scale), _array(product.bias)
        x = dequantize(quantizers[0], left + quantizers[0].zero_point)
        expected = integer_linear(quantizers[0], x, codes, scale, bias)
        return expected, np.abs(expected - bias) + np.abs(bias)
    right = seen[str(product.right.name)].astype(np.int32) - right_zero
    total = left.astype(np.float64, order="C") @ right.astype(np.float64, order="C")
    expected = total.astype(np.float32) * (np.float32(quantizers[0].scale) * np.float32(quantizers[1].scale))
    return expected, np.abs(expected)


EDITED = "Was the model edited after it was compiled, or does it belong to another plan?"
SATURATED = (
    "This processor (AVX2 without VNNI) adds pairs of 8-bit products in saturating 16 bits: a model that was compiled "
    "with the full range of 8 bits is for others. Or was it edited after it was compiled?"
)


def _raise_if_wrong(checks: Sequence[SiteCheck], what: str) -> None:
    wrong = [check for check in checks if check.code_mismatches or not check.error <= 1]
    if not wrong:
        return
    worst = max(wrong, key=lambda check: (check.code_mismatches / max(check.codes, 1), check.error))
    raise VerifyError(
        f"{len(wrong)} of {len(checks)} {what} do not give what the plan means; the worst is {worst.site} "
        f"({worst.product}): {worst.code_mismatches} of {worst.codes} codes differ, and the output is off by "
        f"{worst.error:.1f} times what float32 rounding allows. {SATURATED if saturates_here() else EDITED}"
    )


def _array(value: ir.Value | None) -> NDArray[np.float32]:
    array = constant_of(value)
    assert array is not None, "scales and biases of integer products are constants"
    return array.astype(np.float32, copy=False)


def _number(value: ir.Value | None) -> int:
    array = None if value is None else constant_of(value)
    return 0 if array is None else int(array)
