"""Write integer products as ONNX Runtime's own operator, where it needs no fusion to be fast.

    Cast(MatMulInteger(a, b, a_zero, b_zero)) * (DequantizeLinear(1, a_scale) * b_scale) (+ bias)
 => com.microsoft.MatMulIntegerToFloat(a, b, a_scale, b_scale, a_zero, b_zero, bias)

The same kernel runs; the scalar DequantizeLinear of each product is saved. A second run is refused by its stage.
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.edit import Builder, remove_dead, replace_value
from mptqc.graph.integer_products import LOWERED_DOMAIN, LOWERED_OP, IntegerProduct, find_integer_products
from mptqc.passes.base import Pass, PassResult, Stage

DOMAIN_VERSION = 1


@dataclass(frozen=True)
class LowerToCpu(Pass):
    """Replace each integer product by MatMulIntegerToFloat."""

    name: ClassVar[str] = "lower-to-cpu"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.QUANTIZED,)
    ensures: ClassVar[Stage | None] = Stage.LOWERED

    def call(self, model: ir.Model) -> PassResult:
        """Find all integer products, then rewrite them.

        Raises:
            VerifyError: a MatMulInteger is not in the form that the quantize passes write.
        """
        found = find_integer_products(model)
        for product in found:
            _lower(product)
        remove_dead(model)
        if found:
            model.opset_imports[LOWERED_DOMAIN] = DOMAIN_VERSION
        return PassResult(model, len(found))


def _lower(product: IntegerProduct) -> None:
    build = Builder(product.last, product.site)
    inputs = [
        product.left,
        product.right,
        product.left_scale,
        product.right_scale,
        product.left_zero,
        product.right_zero,
        product.bias,
    ]
    while inputs[-1] is None:
        inputs.pop()
    name = str(product.node.name).removeprefix(f"{product.site}/")
    node = build.node(LOWERED_OP, inputs, domain=LOWERED_DOMAIN, name=f"{name}_lowered")
    node.metadata_props.update(product.node.metadata_props)
    old, new = product.output, node.outputs[0]
    replace_value(old, new)
    if not new.is_graph_output():  # keeps the name by which the Linear's output can be compared with the float model's
        old.name, new.name = f"{old.name}_unlowered", old.name
