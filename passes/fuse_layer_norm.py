"""Recognise LayerNorm over the last axis, however it was exported.

    μ = mean(x)    d = x − μ    σ² = mean(d²)    y = γ·d/√(σ² + ε) + β        [.., C] → [.., C]

Forms: d·d or Pow(d, 2); one or two Subs; Div by Sqrt, or Mul by its reciprocal (Reciprocal, 1/√, Pow −½);
γ and β in either order of operands, or missing; and x·g + (β − μ·g) with g = γ/√(σ² + ε), which Keras exports.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import (
    Builder,
    constant_of,
    is_op,
    only_consumer,
    producer,
    remove_dead,
    replace_value,
    scalar_of,
)
from mptqc.graph.shapes import is_last_axis, last_dim, rank_of
from mptqc.passes.base import Pass, PassResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerNormMatch:
    """One decomposed LayerNorm: x [.., C] in, `output` [.., C] out; gamma and beta are [C] float32."""

    x: ir.Value
    output: ir.Value
    gamma: NDArray[np.float32]
    beta: NDArray[np.float32]
    epsilon: float


@dataclass(frozen=True)
class _Core:
    """What lies before the division: the norm's input, ε, and the nodes."""

    x: ir.Value
    epsilon: float
    inner: frozenset[ir.Node]


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """Make every decomposed LayerNorm over the last axis one LayerNormalization(x, γ[C], β[C]; axis=-1), ε kept.

    Missing γ and β become ones and zeros. A norm of which an intermediate value is read elsewhere, or with an
    affine that is not constant, or of another axis, stays as it is. One run is a fixpoint.
    """

    name: ClassVar[str] = "fuse-layer-norm"

    def call(self, model: ir.Model) -> PassResult:
        """Find all, then replace all."""
        matches = list(find_layer_norms(model.graph))
        replaced: dict[ir.Value, ir.Value] = {}
        for match in matches:
            replaced[match.output] = _replace(match, replaced.get(match.x, match.x))
        if matches:
            remove_dead(model)
        return PassResult(model, len(matches))


def find_layer_norms(graph: ir.Graph) -> Iterator[LayerNormMatch]:
    """Yield every decomposed LayerNorm over the last axis, in graph order; pure."""
    for node in graph:
        if is_op(node, "Div", "Mul"):
            match = _match_quotient(node)
        elif is_op(node, "Add"):
            match = _match_scale_and_offset(node)
        else:
            continue
        if match is not None:
            yield match


def _replace(match: LayerNormMatch, x: ir.Value) -> ir.Value:
    anchor = match.output.producer()
    assert anchor is not None
    prefix = (anchor.name or match.output.name or "norm").rpartition("/")[0] or match.output.name or "norm"
    build = Builder(anchor, prefix)
    gamma = build.constant("gamma", match.gamma)
    beta = build.constant("beta", match.beta)
    attributes = {"axis": -1, "epsilon": match.epsilon}
    new = build.op("LayerNormalization", [x, gamma, beta], attributes)
    replace_value(match.output, new)
    logger.debug("fused %s", prefix)
    return new


def _match_quotient(node: ir.Node) -> LayerNormMatch | None:
    """γ·(d/√(σ² + ε)) + β, found from the division."""
    for difference, inverse in _operand_orders(node, commutative=node.op_type == "Mul"):
        sub = producer(difference, "Sub")
        core = _match_core(inverse, is_divisor=node.op_type == "Div")
        if sub is None or core is None or sub.inputs[0] is not core.x or not _is_mean_of(sub.inputs[1], core.x):
            continue
        mean = sub.inputs[1].producer() if sub.inputs[1] is not None else None
        inner = core.inner | {sub} | ({mean} if mean is not None else set())
        if not _only_read_inside(inner, {node}):
            continue
        return _with_affine(node.outputs[0], core)
    return None


def _with_affine(normalized: ir.Value, core: _Core) -> LayerNormMatch | None:
    gamma, beta, output = None, None, normalized
    channels = last_dim(core.x)
    scale = _affine_step(output, "Mul", core.x, channels)
    if scale is not None:
        output, gamma = scale
    offset = _affine_step(output, "Add", core.x, channels)
    if offset is not None:
        output, beta = offset
    channels = channels or next((each.size for each in (gamma, beta) if each is not None and each.size > 1), None)
    if channels is None:
        return None
    ones = np.ones(channels, np.float32)
    return LayerNormMatch(
        core.x,
        output,
        ones if gamma is None else gamma * ones,
        0 * ones if beta is None else beta * ones,
        core.epsilon,
    )


def _affine_step(
    value: ir.Value, op_type: str, x: ir.Value, channels: int | None
) -> tuple[ir.Value, NDArray[np.float32]] | None:
    """The Mul or Add that is `value`'s only reader, if its other operand is a constant along the last axis."""
    node = only_consumer(value)
    if not is_op(node, op_type) or node is None:
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    vector = _channel_vector(constant_of(other), x, channels)
    return None if vector is None else (node.outputs[0], vector)


def _channel_vector(array: NDArray[np.generic] | None, x: ir.Value, channels: int | None) -> NDArray[np.float32] | None:
    """The constant as [C] or [1], or None if it varies along another axis or would widen x."""
    if array is None or array.dtype != np.float32:
        return None
    rank = rank_of(x)
    fits = array.size in (1, channels) if channels is not None else True
    along_last = array.ndim == 0 or array.size == array.shape[-1]
    if not fits or not along_last or array.ndim > (1 if rank is None else rank):
        return None
    return array.reshape(-1).astype(np.float32)


def _match_scale_and_offset(node: ir.Node) -> LayerNormMatch | None:
    """x·g + (β − μ·g), g = γ/√(σ² + ε), found from the sum."""
    for scaled, offset in _operand_orders(node, commutative=True):
        product, difference = producer(scaled, "Mul"), producer(offset, "Sub")
        if product is None or difference is None:
            continue
        shift = producer(difference.inputs[1], "Mul")
        if shift is None:
            continue
        for x, gain in _operand_orders(product, commutative=True):
            match = _match_gain(node, x, gain, product, difference, shift)
            if match is not None:
                return match
    return None


def _match_gain(
    node: ir.Node, x: ir.Value, gain: ir.Value, product: ir.Node, difference: ir.Node, shift: ir.Node
) -> LayerNormMatch | None:
    means = [value for value in shift.inputs if value is not gain]
    if gain not in shift.inputs or len(means) != 1 or not _is_mean_of(means[0], x):
        return None
    inner = {product, difference, shift}
    gamma: NDArray[np.float32] | None = None
    inverse = gain
    scale = producer(gain, "Mul")
    if scale is not None:
        for value, constant in _operand_orders(scale, commutative=True):
            vector = _channel_vector(constant_of(constant), x, last_dim(x))
            if vector is not None:
                inverse, gamma = value, vector
                inner.add(scale)
    core = _match_core(inverse, is_divisor=False)
    beta = _channel_vector(constant_of(difference.inputs[0]), x, last_dim(x))
    mean = means[0].producer() if means[0] is not None else None
    channels = last_dim(x)
    if core is None or core.x is not x or beta is None or mean is None or channels is None:
        return None
    if not _only_read_inside(inner | core.inner | {mean}, {node}):
        return None
    ones = np.ones(channels, np.float32)
    return LayerNormMatch(x, node.outputs[0], ones if gamma is None else gamma * ones, beta * ones, core.epsilon)


def _match_core(value: ir.Value | None, *, is_divisor: bool) -> _Core | None:
    """√(σ² + ε) if `is_divisor`, else its reciprocal."""
    nodes: set[ir.Node] = set()
    root: ir.Value | None = value
    if not is_divisor:
        power = producer(value, "Pow")
        if power is not None and scalar_of(power.inputs[1]) == -0.5:
            return _match_variance(power.inputs[0], nodes | {power})
        reciprocal = producer(value, "Reciprocal")
        quotient = producer(value, "Div")
        if reciprocal is not None:
            nodes, root = {reciprocal}, reciprocal.inputs[0]
        elif quotient is not None and scalar_of(quotient.inputs[0]) == 1.0:
            nodes, root = {quotient}, quotient.inputs[1]
        else:
            return None
    sqrt = producer(root, "Sqrt") or producer(root, "Pow")
    if sqrt is None or (sqrt.op_type == "Pow" and scalar_of(sqrt.inputs[1]) != 0.5):
        return None
    return _match_variance(sqrt.inputs[0], nodes | {sqrt})


def _match_variance(value: ir.Value | None, nodes: set[ir.Node]) -> _Core | None:
    """σ² + ε with σ² = mean((x − mean(x))²) over the last axis."""
    add = producer(value, "Add")
    if add is None:
        return None
    for variance, epsilon in _operand_orders(add, commutative=True):
        eps = scalar_of(epsilon)
        mean = producer(variance, "ReduceMean")
        if eps is None or eps < 0 or mean is None or not _reduces_last_axis(mean):
            continue
        square = producer(mean.inputs[0], "Pow", "Mul")
        if square is None or not _is_square(square):
            continue
        sub = producer(square.inputs[0], "Sub")
        if sub is None or sub.inputs[0] is None or not _is_mean_of(sub.inputs[1], sub.inputs[0]):
            continue
        inner_mean = sub.inputs[1].producer() if sub.inputs[1] is not None else None
        assert inner_mean is not None
        return _Core(sub.inputs[0], eps, frozenset(nodes | {add, mean, square, sub, inner_mean}))
    return None


def _is_square(node: ir.Node) -> bool:
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1]
    return scalar_of(node.inputs[1]) == 2.0


def _is_mean_of(value: ir.Value | None, x: ir.Value) -> bool:
    mean = producer(value, "ReduceMean")
    return mean is not None and mean.inputs[0] is x and _reduces_last_axis(mean)


def _reduces_last_axis(node: ir.Node) -> bool:
    if node.attributes.get_int("keepdims", 1) != 1:
        return False
    if "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    else:
        constant = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = [] if constant is None else [int(axis) for axis in constant.reshape(-1)]
    return len(axes) == 1 and is_last_axis(axes[0], node.inputs[0])


def _operand_orders(node: ir.Node, *, commutative: bool) -> Iterator[tuple[ir.Value, ir.Value]]:
    left, right = node.inputs[0], node.inputs[1]
    if left is None or right is None:
        return
    yield left, right
    if commutative:
        yield right, left


def _only_read_inside(inner: set[ir.Node] | frozenset[ir.Node], last: set[ir.Node]) -> bool:
    """True if no value made by `inner` is a graph output or is read by a node outside."""
    readers = inner | last
    return all(
        not output.is_graph_output() and all(reader in readers for reader in output.consumers())
        for node in inner
        for output in node.outputs
    )
