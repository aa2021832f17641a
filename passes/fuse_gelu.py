"""Recognise GELU, however it was exported.

    none:  y = x·½·(1 + erf(x/√2))
    tanh:  y = x·½·(1 + tanh(√(2/π)·(x + 0.044715·x³)))

The argument of erf or tanh is read as a polynomial in x and the rest as a product, so that the order of the
operands and where the constants stand do not matter; their values do.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.convert_precision import SOURCE_PRECISION_KEY
from mptqc.graph.edit import Builder, is_op, only_consumer, producer, remove_dead, replace_value, scalar_of
from mptqc.passes.base import Pass, PassResult

logger = logging.getLogger(__name__)

# A relative error δ of √2 moves the output by at most max|x·x·φ(x)|·δ < 0.3·δ: 1e-5 is within float32's noise.
CONSTANT_TOLERANCE = 1e-5
# In a model converted from half precision each constant was rounded by up to 2⁻⁹ (bfloat16); three multiply.
HALF_CONSTANT_TOLERANCE = 3 * 2**-9
_MAX_DEPTH = 8

Polynomial = dict[int, float]

_ARGUMENTS: dict[str, tuple[str, Polynomial]] = {
    "Erf": ("none", {1: math.sqrt(0.5)}),
    "Tanh": ("tanh", {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}),
}


@dataclass(frozen=True)
class GeluMatch:
    """One decomposed GELU: `x` in, `output` out, and the nodes between."""

    x: ir.Value
    output: ir.Value
    approximate: str


@dataclass(frozen=True)
class FuseGelu(Pass):
    """Make every exact or tanh GELU one Gelu(x; approximate). One run is a fixpoint.

        y = Mul(Mul(x, 0.5), Add(Erf(Div(x, 1.41421)), 1))    →    y = Gelu(x; approximate="none")

    Other constants (as in a sigmoid approximation), or an inner value that is read elsewhere, leave it as it is.
    """

    name: ClassVar[str] = "fuse-gelu"

    def call(self, model: ir.Model) -> PassResult:
        """Find all, then replace all."""
        half = model.metadata_props.get(SOURCE_PRECISION_KEY) in ("float16", "bfloat16")
        matches = list(find_gelus(model.graph, HALF_CONSTANT_TOLERANCE if half else CONSTANT_TOLERANCE))
        replaced: dict[ir.Value, ir.Value] = {}
        for match in matches:
            anchor = match.output.producer()
            assert anchor is not None
            prefix = (anchor.name or "").rpartition("/")[0] or match.output.name or "gelu"
            x = replaced.get(match.x, match.x)
            new = Builder(anchor, prefix).op("Gelu", [x], {"approximate": match.approximate})
            replace_value(match.output, new)
            replaced[match.output] = new
            logger.debug("fused %s", prefix)
        if matches:
            remove_dead(model)
        return PassResult(model, len(matches))


def find_gelus(graph: ir.Graph, tolerance: float = CONSTANT_TOLERANCE) -> Iterator[GeluMatch]:
    """Yield every decomposed GELU whose constants are right to `tolerance` (relative), in graph order; pure."""
    for node in graph:
        if is_op(node, *_ARGUMENTS):
            match = _match(node, tolerance)
            if match is not None:
                yield match


def _match(node: ir.Node, tolerance: float) -> GeluMatch | None:
    approximate, wanted = _ARGUMENTS[node.op_type]
    started = _one_plus(node.outputs[0], tolerance)
    if started is None:
        return None
    value, factor = started
    x: ir.Value | None = None
    while True:
        step = only_consumer(value)
        if step is None or not is_op(step, "Mul", "Div"):
            return None
        if step.op_type == "Div":
            divisor = scalar_of(step.inputs[1])
            if step.inputs[0] is not value or not divisor:
                return None
            factor /= divisor
        else:
            other = step.inputs[1] if step.inputs[0] is value else step.inputs[0]
            constant = scalar_of(other)
            if constant is not None:
                factor *= constant
            elif x is None and (found := _linear_in_argument(other, node, wanted, tolerance)) is not None:
                x, scale = found
                factor *= scale
            else:
                return None
        value = step.outputs[0]
        if x is not None and _close(factor, 0.5, tolerance):
            return GeluMatch(x, value, approximate)


def _one_plus(value: ir.Value, tolerance: float) -> tuple[ir.Value, float] | None:
    """c·(1 + t), as Add(t, 1) or as Add(c·t, c); returns the sum and c."""
    factor = 1.0
    step = only_consumer(value)
    if step is not None and is_op(step, "Mul"):
        constant = scalar_of(step.inputs[1] if step.inputs[0] is value else step.inputs[0])
        if constant is None:
            return None
        factor, value = constant, step.outputs[0]
        step = only_consumer(value)
    if step is None or not is_op(step, "Add"):
        return None
    addend = scalar_of(step.inputs[1] if step.inputs[0] is value else step.inputs[0])
    if addend is None or not _close(addend, factor, tolerance):
        return None
    return step.outputs[0], factor


def _linear_in_argument(
    value: ir.Value | None, node: ir.Node, wanted: Polynomial, tolerance: float
) -> tuple[ir.Value, float] | None:
    """(x, c) with `value` = c·x such that the argument of `node` is the wanted polynomial in x."""
    if value is None:
        return None
    candidates = [(value, 1.0)]
    scaled = producer(value, "Mul", "Div")
    if scaled is not None and only_consumer(value) is not None:
        left, right = scaled.inputs[0], scaled.inputs[1]
        by_right, by_left = scalar_of(right), scalar_of(left)
        if left is not None and by_right:
            candidates.append((left, by_right if scaled.op_type == "Mul" else 1 / by_right))
        if right is not None and by_left is not None and scaled.op_type == "Mul":
            candidates.append((right, by_left))
    for x, scale in candidates:
        inner: set[ir.Node] = {node}
        polynomial = _polynomial(node.inputs[0], x, inner, _MAX_DEPTH)
        if polynomial is not None and _same(polynomial, wanted, tolerance) and _only_read_inside(inner):
            return x, scale
    return None


def _only_read_inside(nodes: set[ir.Node]) -> bool:
    """True if only the erf or tanh itself, which ends `nodes`, is read outside of them."""
    return all(
        not node.outputs[0].is_graph_output()
        and (is_op(node, *_ARGUMENTS) or all(reader in nodes for reader in node.outputs[0].consumers()))
        for node in nodes
    )


def _same(one: Polynomial, other: Polynomial, tolerance: float) -> bool:
    return one.keys() == other.keys() and all(_close(one[power], other[power], tolerance) for power in other)


def _close(value: float, wanted: float, tolerance: float) -> bool:
    return math.isclose(value, wanted, rel_tol=tolerance)


def _polynomial(value: ir.Value | None, x: ir.Value, nodes: set[ir.Node], depth: int) -> Polynomial | None:
    """`value` as {power: coefficient} in `x`, adding the nodes passed to `nodes`; None if it is no polynomial."""
    if value is x:
        return {1: 1.0}
    constant = scalar_of(value)
    if constant is not None:
        return {0: constant}
    node = producer(value, "Mul", "Add", "Div", "Pow")
    if node is None or depth == 0:
        return None
    nodes.add(node)
    left = _polynomial(node.inputs[0], x, nodes, depth - 1)
    right = _polynomial(node.inputs[1], x, nodes, depth - 1)
    if left is None or right is None:
        return None
    if node.op_type == "Add":
        return {power: left.get(power, 0.0) + right.get(power, 0.0) for power in left.keys() | right.keys()}
    if node.op_type == "Mul":
        return _product(left, right)
    if right.keys() != {0} or right[0] == 0:
        return None
    if node.op_type == "Div":
        return {power: coefficient / right[0] for power, coefficient in left.items()}
    if right[0] not in (2.0, 3.0):
        return None
    result = left
    for _ in range(int(right[0]) - 1):
        result = _product(result, left)
    return result


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for power, coefficient in left.items():
        for other, factor in right.items():
            result[power + other] = result.get(power + other, 0.0) + coefficient * factor
    return result
