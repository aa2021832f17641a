"""Does each operator of `ai.mptqc` give, on what it reads, what the plan means? Compared with the numpy reference.

Inputs and outputs are those of one run; scales and quantizers are the plan's, not the file's. What no plan knows (ε,
GELU, the number of heads) is the file's. An output is right if it follows from values within the tolerances of
`mptqc.reference.custom_ops`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.site_check import SiteCheck, Values
from mptqc.errors import VerifyError
from mptqc.graph.edit import constant_of, is_op
from mptqc.graph.layout import MOVEMENT_OPS
from mptqc.graph.match import site_of
from mptqc.graph.native_nodes import ATTENTION_OPS, LINEAR_OPS, is_native, native_weight, native_weight_scale
from mptqc.plan import ActivationQuantizer, AttentionPlan, LayerPlan, QuantPlan
from mptqc.reference.custom_op_bounds import output_bounds
from mptqc.reference.custom_ops import CodeAttribute, block_weight, code_quantizer

GROUP_NODES = 16

Run = Callable[[Sequence[str]], Values]


def check_native_weights(nodes: Sequence[ir.Node], plan: QuantPlan) -> None:
    """The weight scales, and the codes where the plan has them, are the planned ones.

    Raises:
        VerifyError: they are not.
    """
    layers = {layer.site: layer for layer in plan.layers}
    for node in nodes:
        if not is_native(node, *LINEAR_OPS):
            continue
        site = site_of(node)
        codes = plan.codes(site)
        if not np.array_equal(native_weight_scale(node), plan.array(f"{site}/weight_scale")):
            raise VerifyError(f"{site}: the weight scales in the model are not those of the plan; compile again")
        if codes is not None and not np.array_equal(native_weight(node).integers, layers[site].integers(codes)):
            raise VerifyError(f"{site}: the weight codes in the model are not those of the plan; compile again")


def check_native_numbers(nodes: Sequence[ir.Node], plan: QuantPlan, run: Run) -> list[SiteCheck]:
    """Compare each operator with the reference; `run` gives values of the model by name."""
    checks: list[SiteCheck] = []
    for start in range(0, len(nodes), GROUP_NODES):
        group = nodes[start : start + GROUP_NODES]
        seen = run([str(value.name) for node in group for value in _computed(node)])
        checks += [check for node in group for check in _checks(node, plan, seen)]
    return checks


def _computed(node: ir.Node) -> list[ir.Value]:
    """The outputs and the inputs that are no constants; a packed weight is read from the file instead."""
    weight = node.inputs[1] if is_native(node, *LINEAR_OPS) else None
    inputs = [
        value for value in node.inputs if value is not None and value is not weight and constant_of(value) is None
    ]
    return [*node.outputs, *inputs]


def _checks(node: ir.Node, plan: QuantPlan, seen: Values) -> list[SiteCheck]:
    """One for each output."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = [_input(node, index, seen) for index in range(len(node.inputs))]
    planned = attributes | _planned_operands(node, plan)
    outputs = [seen[str(value.name)] for value in node.outputs]
    if outputs[-1].dtype == np.uint8:
        quantizer = code_quantizer(_planned_output(node, plan))
        planned |= quantizer.attributes("output")
        outputs[-1] = outputs[-1].astype(np.int32) - int(attributes["output_zero_point"]) + quantizer.zero_point
    checks = []
    for output, (low, high) in zip(outputs, output_bounds(node.op_type, planned, inputs), strict=True):
        wrong = int(((output < low) | (output > high)).sum())
        checks.append(SiteCheck(site_of(node), str(node.name), wrong, output.size, 0.0, fused=True))
    return checks


def _input(node: ir.Node, index: int, seen: Values) -> NDArray[Any] | None:
    value = node.inputs[index]
    if value is None:
        return None
    if index == 1 and is_native(node, *LINEAR_OPS):
        return block_weight(native_weight(node).integers)
    constant = constant_of(value)
    return seen[str(value.name)] if constant is None else constant


def _planned_operands(node: ir.Node, plan: QuantPlan) -> dict[str, CodeAttribute]:
    """The attributes that say how the plan quantizes what the operator reads, and the probabilities."""
    if is_native(node, *LINEAR_OPS):
        return {"input_scale": float(np.float32(_layer(node, plan).input.scale))}
    if not is_native(node, *ATTENTION_OPS):
        return {}
    planned = _attention(node, plan)
    scales = {f"{letter}_scale": float(np.float32(getattr(planned, letter).scale)) for letter in "qkv"}
    return scales | code_quantizer(planned.p).attributes("p")


def _planned_output(node: ir.Node, plan: QuantPlan) -> ActivationQuantizer:
    """The planned quantizer of what reads the operator's codes, at the far end of any movement.

    Raises:
        VerifyError: nothing that the plan names reads them, or it takes another code for zero.
    """
    frontier = [node.outputs[-1]]
    while frontier:
        for use in frontier.pop().uses():
            if is_op(use.node, "Concat", *MOVEMENT_OPS):
                frontier.extend(use.node.outputs)
            elif is_native(use.node, *ATTENTION_OPS):
                attention, letter = _attention(use.node, plan), "qkv"[use.idx]
                _check_zero_point(node, use.node, f"{letter}_zero_point")
                return (attention.q, attention.k, attention.v)[use.idx]
            elif is_native(use.node, *LINEAR_OPS):
                _check_zero_point(node, use.node, "input_zero_point")
                return _layer(use.node, plan).input
            elif is_op(use.node, "DequantizeLinear"):
                _check_opened(node, use.node)
                return next(tensor for tensor in plan.tensors if tensor.site == site_of(use.node)).quantizer
            elif any(each.site == site_of(use.node) for each in plan.layers):
                return _layer(use.node, plan).input
            elif is_op(use.node, "MatMulInteger"):  # an attention in portable form: k and v of it are int8
                return _attention(use.node, plan).q
    raise VerifyError(f"{node.name}: no planned product reads its codes; the file was edited after it was compiled")


def _check_zero_point(writer: ir.Node, reader: ir.Node, name: str) -> None:
    written, read = writer.attributes["output_zero_point"].as_int(), reader.attributes[name].as_int()
    if written != read:
        raise VerifyError(
            f"{site_of(reader)}: {name} is {read}, but {writer.name} writes codes with zero point {written}; the file "
            "was edited after it was compiled"
        )


def _check_opened(writer: ir.Node, reader: ir.Node) -> None:
    """A tensor's DequantizeLinear takes for zero what the operator writes for zero."""
    read = constant_of(reader.inputs[2])
    if read is None or int(read) != writer.attributes["output_zero_point"].as_int():
        raise VerifyError(
            f"{site_of(reader)}: {reader.name} takes another code for zero than {writer.name} writes; the file was "
            "edited after it was compiled"
        )


def _layer(node: ir.Node, plan: QuantPlan) -> LayerPlan:
    return next(layer for layer in plan.layers if layer.site == site_of(node))


def _attention(node: ir.Node, plan: QuantPlan) -> AttentionPlan:
    return next(attention for attention in plan.attentions if attention.site == site_of(node))
