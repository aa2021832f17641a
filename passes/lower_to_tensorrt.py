"""Write integer products as TensorRT reads them: explicit, symmetric int8 quantizers before float products.

    x -> QuantizeLinear(scale, zero point) (-> Clip) -> movement -> MatMulInteger(·, W) -> Cast -> Mul (-> Add(bias))
 => x (-> Clip) -> QuantizeLinear(scale', 0) -> DequantizeLinear -> movement -> MatMul(·, DequantizeLinear(W)) -> …

TensorRT takes zero points of 0 only. With n = code - zero point from n0 to n1, as far as x reaches, a quantizer whose n
all fit int8 is kept exactly, with scale' = scale; others get scale' = max(|n0|, |n1|)·scale/127: coarser steps. Either
way x is clipped to [n0·scale, n1·scale] first. Quantizers of several regions have no such form and are refused, as are
tensors that are quantized between the products (full coverage). A second run is refused by its stage.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.errors import RefusalError
from mptqc.graph.edit import Builder, constant_of, is_op, remove_dead, replace_value
from mptqc.graph.integer_products import IntegerProduct, find_integer_products, find_sources, stored_weight
from mptqc.graph.quantizer_match import FoundQuantizer, match_quantizer
from mptqc.graph.quantizer_nodes import lowest_code
from mptqc.passes.base import Pass, PassResult, Stage

LOWEST, HIGHEST = -128, 127
"""Of int8."""


@dataclass(frozen=True)
class LowerToTensorRt(Pass):
    """Replace integer products by float ones between symmetric int8 quantizers."""

    name: ClassVar[str] = "lower-to-tensorrt"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.QUANTIZED,)
    ensures: ClassVar[Stage | None] = Stage.LOWERED

    def call(self, model: ir.Model) -> PassResult:
        """Find all products and their quantizers, then rewrite them.

        Raises:
            RefusalError: a quantizer has several regions, or is not before a product; the sites are named.
            VerifyError: a product is not in the form that the quantize passes write.
        """
        products = find_integer_products(model)
        quantizers = _find_quantizers(products)
        _refuse_tensors(model)
        for quantizer in quantizers:
            _widen(_emit_symmetric(quantizer), quantizer.codes)
        for product in products:
            _lower(product)
        remove_dead(model)
        return PassResult(model, len(products))


def _find_quantizers(products: list[IntegerProduct]) -> list[FoundQuantizer]:
    """Every quantizer of a product's operand, once."""
    found: dict[ir.Value, FoundQuantizer] = {}
    refused: list[str] = []
    for product in products:
        for operand in (product.left,) if product.is_linear else (product.left, product.right):
            for source in find_sources(operand):
                quantizer = match_quantizer(source.codes)
                assert quantizer is not None, "find_sources takes nothing but quantizers"
                found[source.codes] = quantizer
                if quantizer.quantizer.m:
                    refused.append(product.site)
    if refused:
        raise RefusalError(
            f"TensorRT has no quantizers of several regions: {', '.join(dict.fromkeys(refused))} read one; compile the "
            "model with --no-opt-m"
        )
    return list(found.values())


def _refuse_tensors(model: ir.Model) -> None:
    """Products read codes; what is opened again by itself is a tensor of full coverage."""
    opened = [node for node in model.graph if is_op(node, "DequantizeLinear") and constant_of(node.inputs[0]) is None]
    if opened:
        sites = list(dict.fromkeys(str(node.name).partition("/")[0] for node in opened))
        raise RefusalError(
            f"TensorRT takes quantizers with a zero point of 0 before products, and {len(sites)} tensors have others "
            f"({', '.join(sites[:3])}, …); compile the model with --coverage partial"
        )


def _emit_symmetric(found: FoundQuantizer) -> ir.Value:
    """What x becomes once it is quantized symmetrically, float."""
    quantizer = found.quantizer
    producer = found.codes.producer()
    assert producer is not None, "codes are made by nodes"
    build = Builder(producer, str(found.codes.name))
    least, most = quantizer.minimum - quantizer.zero_point, quantizer.maximum - quantizer.zero_point
    x, scale = found.x, quantizer.scale
    lowest = lowest_code(x, scale)
    least = least if lowest is None else max(least, lowest)  # softmax, GELU: codes that no x has
    if (least, most) != (LOWEST, HIGHEST):
        limits = [
            build.constant(name, np.array(limit * scale, np.float32))
            for name, limit in (("minimum", least), ("maximum", most))
        ]
        x = build.op("Clip", [x, *limits], name="clipped")
    if least < LOWEST or most > HIGHEST:
        scale = max(-least, most) * scale / HIGHEST
    operands = [
        build.constant("symmetric_scale", np.array(scale, np.float32)),
        build.constant("symmetric_zero_point", np.array(0, np.int8)),
    ]
    codes = build.op("QuantizeLinear", [x, *operands], name="symmetric_codes")
    opened = build.op("DequantizeLinear", [codes, *operands], name="symmetric")
    opened.shape, opened.dtype = found.codes.shape, ir.DataType.FLOAT
    return opened


def _widen(opened: ir.Value, codes: ir.Value) -> None:
    """Let what reads the codes read floats; movement behind them moves floats then."""
    replace_value(codes, opened)
    frontier = [opened]
    while frontier:
        for node in frontier.pop().consumers():
            moved = node.outputs[0]
            if moved.dtype in (ir.DataType.UINT8, ir.DataType.INT8):
                moved.dtype = ir.DataType.FLOAT
                frontier.append(moved)


def _lower(product: IntegerProduct) -> None:
    build = Builder(product.last, product.site)
    right = product.right
    if product.is_linear:
        codes = stored_weight(product).integers
        zeros = np.zeros(codes.shape[1], np.int8)
        operands = [build.constant("codes", codes), product.right_scale, build.constant("zeros", zeros)]
        right = build.op("DequantizeLinear", operands, {"axis": 1}, name="weight")
    y = build.op("MatMul", [product.left, right], name=str(product.node.name).removeprefix(f"{product.site}/"))
    if product.bias is not None:
        y = build.op("Add", [y, product.bias], name="biased")
    old = product.output
    y.shape, y.dtype = old.shape, ir.DataType.FLOAT
    replace_value(old, y)
    if not y.is_graph_output():
        old.name, y.name = f"{old.name}_unlowered", old.name
