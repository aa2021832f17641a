"""Quantize what full coverage adds to the operands of products: each planned tensor gives way to its dequantized codes.

    x -> readers
 => x -> quantizer -> DequantizeLinear(Δ) -> readers                              if only norms and Gelu read x
    x -> quantizer -> DequantizeLinear(1) -> Mul(Δ) -> readers                    else
    x -> Mul(2^−e) -> quantizer -> DequantizeLinear(1) -> Mul(Δ·2^e) -> readers   with exponents e [C]

All three give (code − z)·Δ·2^e to the last bit. ONNX Runtime rewrites DequantizeLinear -> Add or Softmax ->
QuantizeLinear as one integer operator that rounds otherwise (and QLinearSoftmax is slow); the Mul keeps it from that.
Runs on float products, before the passes that quantize them. A second run finds the tensors quantized and says so.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import PlanError
from mptqc.graph.edit import Builder, add_initializer, is_op
from mptqc.graph.match import SITE_KEY
from mptqc.graph.quantized_tensors import find_quantized_tensors
from mptqc.graph.quantizer_nodes import Codes, Operand, check_quantizer, emit_quantizer
from mptqc.graph.tensors import Tensor, find_marked, find_tensors
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.plan import QuantPlan, TensorPlan

UNIT_SCALE_NAME = "mptqc/unit_scale"
MOST_EXPONENT = 60
"""Far from float32's own limits, so that scales and quotients by powers of two are exact."""

# ONNX Runtime has no integer form of these on CPUs.
_NEVER_FUSED = ("LayerNormalization", "Gelu")


@dataclass(frozen=True)
class QuantizeTensors(Pass):
    """Put a quantizer and its inverse behind each planned tensor."""

    name: ClassVar[str] = "quantize-tensors"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.SMOOTHED,)
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Find all planned tensors, then quantize them in graph order.

        Raises:
            PlanError: a planned tensor is missing or quantized already, or its quantizer or exponents do not fit.
        """
        if not self.plan.tensors:
            return PassResult(model, 0)
        found = [
            (tensor, planned, channel_factors(planned, self.plan))
            for tensor, planned in find_planned_tensors(model, self.plan)
        ]
        order = {node: position for position, node in enumerate(model.graph)}
        for tensor, planned, factors in found:
            _quantize(tensor, planned, factors, order)
        return PassResult(model, len(found))


def find_planned_tensors(model: ir.Model, plan: QuantPlan) -> list[tuple[Tensor, TensorPlan]]:
    """Each planned tensor with its plan, in graph order.

    Raises:
        PlanError: a planned tensor is not in the model, is quantized already, or its quantizer does not fit 8 bits.
    """
    planned = {each.site: each for each in plan.tensors}
    done = {each.site for each in find_quantized_tensors(model)}
    found = [
        (tensor, planned[tensor.site])
        for tensor in find_marked(model) or find_tensors(model).found
        if tensor.site in planned and tensor.site not in done
    ]
    missing = planned.keys() - {tensor.site for tensor, _ in found}
    if missing:
        raise PlanError(
            f"the plan quantizes {', '.join(sorted(missing))}, which the model does not have as a float tensor; "
            "the plan belongs to another model, or the model is quantized already"
        )
    for tensor, each in found:
        check_quantizer(each.quantizer, tensor.site)
    return found


def channel_factors(planned: TensorPlan, plan: QuantPlan) -> NDArray[np.float32] | None:
    """2^e [C] of a tensor, or None if it has no exponents.

    Raises:
        PlanError: the plan lacks them, or they are out of range.
    """
    if not planned.exponents:
        return None
    exponents = plan.array(f"{planned.site}/exponents")
    if exponents.ndim != 1 or exponents.min() != 0 or not exponents.max() <= MOST_EXPONENT:
        raise PlanError(
            f"{planned.site}: exponents have shape {exponents.shape}, from {exponents.min():g} to "
            f"{exponents.max():g}; expected one for each channel, from 0 to at most {MOST_EXPONENT}: "
            "the plan is damaged"
        )
    return np.exp2(exponents)


def _quantize(
    tensor: Tensor, planned: TensorPlan, factor: NDArray[np.float32] | None, order: dict[ir.Node, int]
) -> None:
    """Let every reader of the tensor read its dequantized codes."""
    uses = list(tensor.value.uses())
    build = Builder(min((use.node for use in uses), key=order.__getitem__), planned.site)
    divided = tensor.value
    if factor is not None:
        divided = _multiply(divided, build.constant("divisor", 1 / factor), build, "divide")
    codes = emit_quantizer(divided, Operand(planned.quantizer), build)
    if factor is not None:
        channel_scale = build.constant("channel_scale", np.float32(planned.quantizer.scale) * factor)
        result = _multiply(
            _open(codes, _unit_scale(build.graph), planned.site, build), channel_scale, build, "multiply"
        )
    elif all(is_op(use.node, *_NEVER_FUSED) for use in uses):
        result = _open(codes, codes.scale, planned.site, build)
    else:
        result = _multiply(_open(codes, _unit_scale(build.graph), planned.site, build), codes.scale, build, "multiply")
    for use in uses:
        use.node.replace_input_with(use.idx, result)


def _open(codes: Codes, scale: ir.Value, site: str, build: Builder) -> ir.Value:
    """(codes − zero point)·scale; the node bears the site."""
    node = build.node("DequantizeLinear", [codes.codes, scale, codes.zero_point], name="dequantize")
    node.metadata_props[SITE_KEY] = site
    node.outputs[0].shape, node.outputs[0].dtype = codes.codes.shape, ir.DataType.FLOAT
    return node.outputs[0]


def _multiply(value: ir.Value, factor: ir.Value, build: Builder, name: str) -> ir.Value:
    product = build.op("Mul", [value, factor], name=name)
    product.shape, product.dtype = value.shape, ir.DataType.FLOAT
    return product


def _unit_scale(graph: ir.Graph) -> ir.Value:
    """The scale 1, one constant for all."""
    found = graph.initializers.get(UNIT_SCALE_NAME)
    return add_initializer(graph, UNIT_SCALE_NAME, np.array(1, np.float32)) if found is None else found
