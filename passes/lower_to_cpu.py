"""Write integer products as ONNX Runtime's own operator, where it needs no fusion to be fast.

    Cast(MatMulInteger(a, b, a_zero, b_zero)) * (DequantizeLinear(1, a_scale) * b_scale) (+ bias)
 => com.microsoft.MatMulIntegerToFloat(a, b, a_scale, b_scale, a_zero, b_zero, bias)

The same kernel runs; the scalar DequantizeLinear of each product is saved. A second run is refused by its stage.
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.errors import RefusalError
from mptqc.graph.edit import Builder, constant_of, is_op, only_consumer, producer, remove_dead, replace_value
from mptqc.graph.match import SITE_KEY, site_of
from mptqc.passes.base import Pass, PassResult, Stage

DOMAIN, DOMAIN_VERSION = "com.microsoft", 1


@dataclass(frozen=True)
class IntegerProduct:
    """A MatMulInteger and what turns its sums into floats; `bias_add` only for Linears."""

    matmul: ir.Node
    scaled: ir.Node
    left_scale: ir.Value
    right_scale: ir.Value
    bias_add: ir.Node | None
    bias: ir.Value | None


@dataclass(frozen=True)
class LowerToCpu(Pass):
    """Replace each integer product by MatMulIntegerToFloat."""

    name: ClassVar[str] = "lower-to-cpu"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.QUANTIZED,)
    ensures: ClassVar[Stage | None] = Stage.LOWERED

    def call(self, model: ir.Model) -> PassResult:
        """Find all integer products, then rewrite them.

        Raises:
            RefusalError: a MatMulInteger of ours is not in the form that the quantize passes write.
        """
        found = [match_product(node) for node in model.graph if is_op(node, "MatMulInteger") and site_of(node)]
        for product in found:
            _lower(product)
        remove_dead(model)
        if found:
            model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        return PassResult(model, len(found))


def match_product(matmul: ir.Node) -> IntegerProduct:
    """The integer product that this MatMulInteger begins.

    Raises:
        RefusalError: it is not followed by Cast and Mul with a product of two scales.
    """
    cast = only_consumer(matmul.outputs[0])
    scaled = only_consumer(cast.outputs[0]) if cast is not None and is_op(cast, "Cast") else None
    scale = producer(scaled.inputs[1], "Mul") if scaled is not None and is_op(scaled, "Mul") else None
    opened = producer(scale.inputs[0], "DequantizeLinear") if scale is not None else None
    if scaled is None or scale is None or opened is None or opened.inputs[1] is None or scale.inputs[1] is None:
        raise RefusalError(
            f"{site_of(matmul)}: {matmul.name} is not followed by Cast and Mul(DequantizeLinear(1, scale) · scale); "
            "an edit after quantization changed it: compile again"
        )
    add = only_consumer(scaled.outputs[0])
    bias = add.inputs[1] if add is not None and is_op(add, "Add") and len(add.inputs) == 2 else None
    if add is not None and bias is scaled.outputs[0]:
        bias = add.inputs[0]
    array = constant_of(bias)
    if array is None or array.ndim != 1:
        add = bias = None
    return IntegerProduct(matmul, scaled, opened.inputs[1], scale.inputs[1], add, bias)


def _lower(product: IntegerProduct) -> None:
    last = product.bias_add or product.scaled
    site = site_of(product.matmul)
    build = Builder(last, site)
    inputs = product.matmul.inputs
    zero_points = [inputs[index] if len(inputs) > index else None for index in (2, 3)]
    node = build.node(
        "MatMulIntegerToFloat",
        [*inputs[:2], product.left_scale, product.right_scale, *zero_points, product.bias],
        domain=DOMAIN,
        name=f"{str(product.matmul.name).removeprefix(f'{site}/')}_lowered",
    )
    node.metadata_props[SITE_KEY] = site
    replace_value(last.outputs[0], node.outputs[0])
