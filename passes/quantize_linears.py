"""Make every planned Linear an integer product.

    MatMul(x, W) -> Add(b)
 => quantizer(x) -> MatMulInteger(·, codes of W) -> Cast -> Mul(Δx·Δw) -> Add(b)

Linears that read one value through one quantizer share it. A Linear that is not in the plan stays float. A second run
finds the planned sites gone and says so.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import PlanError
from mptqc.graph.edit import Builder, remove_dead
from mptqc.graph.emission import WEIGHT_BITS_KEY, QuantizerEmitter, emit_product
from mptqc.graph.match import SITE_KEY, Linear, find_linears
from mptqc.graph.quantizer_nodes import Operand
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.plan import LayerPlan, QuantPlan
from mptqc.reference.quantizers import quantize_weight, weight_limits


@dataclass(frozen=True)
class QuantizeLinears(Pass):
    """Give each planned Linear an activation quantizer, integer weights and an integer product."""

    name: ClassVar[str] = "quantize-linears"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.SMOOTHED,)
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Find all planned Linears, then rewrite them in graph order.

        Raises:
            PlanError: a planned Linear is missing, or its arrays or quantizer do not fit it.
        """
        found = find_planned_linears(model, self.plan)
        weights = {layer.site: integer_weight(linear, layer, self.plan) for linear, layer in found}
        emitter = QuantizerEmitter({(linear.matmul, 0): Operand(layer.input) for linear, layer in found})
        for linear, layer in found:
            node = _quantize(linear, weights[layer.site], self.plan.array(f"{layer.site}/weight_scale"), emitter)
            node.metadata_props.update({SITE_KEY: layer.site, WEIGHT_BITS_KEY: str(layer.weight_bits)})
        remove_dead(model)
        return PassResult(model, len(found))


def find_planned_linears(model: ir.Model, plan: QuantPlan) -> list[tuple[Linear, LayerPlan]]:
    """Each planned Linear with its plan, in graph order.

    Raises:
        PlanError: a planned Linear is not in the model.
    """
    layers = {layer.site: layer for layer in plan.layers}
    found = [(linear, layers[linear.site]) for linear in find_linears(model) if linear.site in layers]
    missing = layers.keys() - {linear.site for linear, _ in found}
    if missing:
        raise PlanError(
            f"the plan quantizes {', '.join(sorted(missing))}, which the model does not have as a float Linear; "
            "the plan belongs to another model, or the model is quantized already"
        )
    return found


def integer_weight(linear: Linear, layer: LayerPlan, plan: QuantPlan) -> NDArray[np.int8]:
    """A Linear's weight in units of its scales, [K, N] int8: of the plan's codes, or of the nearest ones.

    Raises:
        PlanError: codes or scales are missing, of the wrong shape, or out of range.
    """
    scale = plan.array(f"{layer.site}/weight_scale")
    inputs, outputs = linear.weight.shape
    if scale.shape != (outputs,) or not (scale > 0).all():
        raise PlanError(
            f"{layer.site}: weight_scale has shape {scale.shape} (expected {(outputs,)}, all above zero); the plan "
            "belongs to another model"
        )
    planned = plan.arrays.get(f"{layer.site}/weight_codes")
    if planned is None and layer.trellis:
        raise PlanError(f"{layer.site}: the plan has no codes of this weight, which a trellis codes; it is damaged")
    if planned is None:
        return quantize_weight(linear.weight, scale, layer.weight_bits)
    low, high = weight_limits(layer.weight_bits)
    if planned.shape != (inputs, outputs) or planned.dtype != np.int8 or planned.min() < low or planned.max() > high:
        raise PlanError(
            f"{layer.site}: weight_codes are {planned.dtype} {planned.shape} from {planned.min()} to {planned.max()}; "
            f"expected int8 {(inputs, outputs)} from {low} to {high}: the plan belongs to another model"
        )
    return layer.integers(planned.astype(np.int8, copy=False))


def _quantize(
    linear: Linear, weight: NDArray[np.int8], scale: NDArray[np.float32], emitter: QuantizerEmitter
) -> ir.Node:
    """Rewrite one Linear and return its MatMulInteger."""
    site = linear.site
    build = Builder(linear.matmul, site)
    x = emitter.codes(linear.matmul, 0, site)
    both_scales = build.op(
        "Mul", [emitter.open_scale(x, build, "open_scale"), build.constant("weight_scale", scale)], name="product_scale"
    )
    node, product = emit_product(x, build.constant("weight", weight), None, both_scales, build, "product")
    product.shape = linear.matmul.outputs[0].shape
    linear.add.replace_input_with(1 - linear.bias_index, product)
    linear.add.name = f"{site}/add_bias"
    return node
