"""Fold constant scales and shifts into the Linear that feeds them.

    Linear(x) -> movement -> Mul/Div/Add/Sub(·, c)   =>   Linear'(x) -> movement
    W'[:, n] = W[:, n]·a_n     b'_n = b_n·a_n + d_n

c must be a function of the Linear's output channel n alone: LayerScale, the d^-1/2 on q, biases added after a fused
q/k/v was split. A Mul/Div of the attention scores by one number, or by one for each head, moves to q first, and stays
there if q is more than a Linear's channels. Exact in real arithmetic. One run is a fixpoint.
"""

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
    set_initializer,
)
from mptqc.graph.layout import Shapes, readers, trace
from mptqc.graph.match import Linear, find_attentions, match_linear_output
from mptqc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class Affine:
    """`node` multiplies by `scale` and then adds `shift`, per output channel [N] of `linear`."""

    node: ir.Node
    data: ir.Value
    linear: Linear
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Give constant per-channel Mul/Div/Add/Sub behind a Linear to its weight and bias."""

    name: ClassVar[str] = "fold-affine"
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Fold in graph order, so that a chain of affines folds into the same Linear one by one."""
        shapes = dict(self.shapes)
        contexts = {attention.context for attention in find_attentions(model)}
        edits = sum(_move_to_q(node, shapes, contexts) for node in list(model.graph))
        for node in list(model.graph):
            affine = find_affine(node, shapes)
            if affine is None:
                continue
            _apply(affine)
            edits += 1
        if edits:
            remove_dead(model)
        return PassResult(model, edits)


def find_affine(node: ir.Node, shapes: Shapes) -> Affine | None:
    """The affine that `node` applies to a Linear's output channels, or None."""
    parts = _split_operands(node)
    if parts is None:
        return None
    data, constant = parts
    if data.name not in shapes or node.outputs[0].name not in shapes:
        return None
    if shapes[str(data.name)] != shapes[str(node.outputs[0].name)]:
        return None
    found = _own_channels(data, node, shapes)
    if found is None:
        return None
    linear, channels = found
    per_channel = _per_channel(constant, channels, len(linear.bias))
    if per_channel is None:
        return None
    touched = np.zeros(len(linear.bias), bool)
    touched[np.unique(channels)] = True
    one, zero = np.ones(len(touched)), np.zeros(len(touched))
    match node.op_type:
        case "Mul":
            scale, shift = np.where(touched, per_channel, 1.0), zero
        case "Div":
            scale, shift = np.where(touched, 1.0 / np.where(touched, per_channel, 1.0), 1.0), zero
        case "Add":
            scale, shift = one, np.where(touched, per_channel, 0.0)
        case _:
            scale, shift = one, np.where(touched, -per_channel, 0.0)
    return Affine(node, data, linear, scale, shift)


def _move_to_q(node: ir.Node, shapes: dict[str, tuple[int, ...]], contexts: set[ir.Node]) -> bool:
    """Mul or Div(MatMul(q, k), c) becomes MatMul(Mul or Div(q, c), k); c has one number, or one for each head.

    Products in `contexts` are those of probabilities, which stay as softmax makes them.
    """
    parts = _split_operands(node)
    if parts is None or not is_op(node, "Mul", "Div"):
        return False
    scores, constant = parts
    product = producer(scores, "MatMul")
    if (
        product is None
        or product in contexts
        or only_consumer(scores) is not node
        or constant_of(product.inputs[1]) is not None
    ):
        return False
    q, result = product.inputs[0], node.outputs[0]
    if (
        q is None
        or q is product.inputs[1]
        or str(q.name) not in shapes
        or shapes.get(str(scores.name)) != shapes.get(str(result.name))
    ):
        return False
    if constant.size != 1 and (constant.ndim < 2 or constant.shape[-2:] != (1, 1)):
        return False
    build = Builder(product, str(node.name))
    factor = build.constant("factor", (constant if constant.size > 1 else constant.reshape(())).astype(np.float32))
    scaled = build.op(node.op_type, [q, factor], name="scaled_q")
    scaled.shape, scaled.type = q.shape, q.type
    shapes[str(scaled.name)] = shapes[str(q.name)]
    product.replace_input_with(0, scaled)
    replace_value(result, scores)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.remove(node, safe=True)
    return True


def _split_operands(node: ir.Node) -> tuple[ir.Value, NDArray[np.float64]] | None:
    """(computed operand, constant operand) of Mul, Div, Add, Sub; None for the rest, constant − x and constant / x."""
    if not is_op(node, "Mul", "Div", "Add", "Sub"):
        return None
    left, right = node.inputs
    if left is None or right is None:
        return None
    constant = constant_of(right)
    if constant is not None:
        return None if is_op(node, "Div") and not constant.all() else (left, constant.astype(np.float64))
    constant = constant_of(left)
    if constant is None or is_op(node, "Div", "Sub"):
        return None
    return right, constant.astype(np.float64)


def _own_channels(data: ir.Value, node: ir.Node, shapes: Shapes) -> tuple[Linear, NDArray[np.int64]] | None:
    """The Linear that `data` was moved from and its channel of each element, if `node` alone reads them; or None."""
    moved = trace(data, shapes)
    linear = match_linear_output(moved.source)
    if linear is None:
        return None
    channels = moved.channels(shapes)
    return (linear, channels) if _alone(moved.source, channels, data, node, shapes) else None


def _alone(source: ir.Value, channels: NDArray[np.int64], data: ir.Value, node: ir.Node, shapes: Shapes) -> bool:
    """True if nothing but `node`, reading `data`, computes with these channels of `source`."""
    touched = set(np.unique(channels).tolist())
    for reader in readers(source, shapes):
        if reader.node is node and reader.value is data:
            continue
        if touched & set(np.unique(reader.trace.channels(shapes)).tolist()):
            return False
    return True


def _per_channel(constant: NDArray[np.float64], channels: NDArray[np.int64], count: int) -> NDArray[np.float64] | None:
    """The constant as a function of the channel, [count]; None if one channel meets two values."""
    try:
        spread = np.broadcast_to(constant, channels.shape)
    except ValueError:
        return None
    result = np.zeros(count)
    result[channels.reshape(-1)] = spread.reshape(-1)
    return result if np.array_equal(result[channels], spread) else None


def _apply(affine: Affine) -> None:
    linear = affine.linear
    weight = linear.weight * affine.scale
    bias = linear.bias * affine.scale + affine.shift
    set_initializer(linear.matmul, 1, weight.astype(np.float32))
    set_initializer(linear.add, linear.bias_index, bias.astype(np.float32))
    replace_value(affine.node.outputs[0], affine.data)
    graph = affine.node.graph
    assert isinstance(graph, ir.Graph)
    graph.remove(affine.node, safe=True)  # at once: a dead reader would keep the next affine from folding
