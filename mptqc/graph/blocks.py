"""Who may be compensated: what reads a norm, a GELU or a gated product, and the four Linears around an attention."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import RefusalError
from mptqc.graph.edit import constant_of, is_op, only_consumer, producer
from mptqc.graph.layout import Shapes, readers, trace
from mptqc.graph.match import Attention, Linear, Norm, find_linears, match_linear_output
from mptqc.graph.rotary import match_rotated

MASK_FILL = -1e4
"""Softmax in float32 gives exactly 0 to what is filled with this or less, beside scores of any sane size."""


@dataclass(frozen=True)
class Projections:
    """The Linears that make q, k, v, [C -> heads·head_size] ordered (head, channel), and the one after the context.

    `scores` are q and k; None if their heads are rotated, so that neither a shift of k nor a scale of channels cancels.
    """

    scores: tuple[Linear, Linear] | None
    v: Linear
    proj: Linear
    heads: int
    head_size: int


def norm_readers(norm: Norm, model: ir.Model, shapes: Shapes) -> list[Linear]:
    """The Linears that read this norm's channels, in order; empty if nothing but the model's output does.

    Raises:
        RefusalError: something that cannot be compensated reads the norm too.
    """
    return channel_readers(norm.output, norm.site, model, shapes)


def channel_readers(value: ir.Value, name: str, model: ir.Model, shapes: Shapes) -> list[Linear]:
    """The Linears that read the channels (last axis) of a value, in order.

    Raises:
        RefusalError: something that cannot be compensated reads `value`, called `name`, too.
    """
    by_node = {linear.matmul: linear for linear in find_linears(model)}
    width = shapes[str(value.name)][-1]
    found = []
    for reader in readers(value, shapes):
        linear = None if reader.node is None else by_node.get(reader.node)
        if linear is None or reader.value is not linear.input:
            what = "the model's output" if reader.node is None else f"{reader.node.op_type} {reader.node.name}"
            raise RefusalError(f"{name} is also read by {what}, which cannot be compensated")
        channels = reader.trace.channels(shapes)
        if channels.shape[-1] != width or not np.array_equal(
            channels, np.broadcast_to(np.arange(width), channels.shape)
        ):
            raise RefusalError(f"{linear.site} reads the channels of {name} in another order")
        found.append(linear)
    return found


@dataclass(frozen=True)
class Reading:
    """Rows start..start + C of a Linear's weight meet the C channels of a value, or their mean over some tokens."""

    linear: Linear
    start: int


def pooled_readers(value: ir.Value, model: ir.Model, shapes: Shapes) -> list[Reading] | None:
    """The Linears that read a value's channels, also pooled over tokens or side by side with other channels.

    An affine map of the channels (last axis) can be folded into all of them: it commutes with choosing and averaging
    tokens. None if anything else reads the value.
    """
    by_node = {linear.matmul: linear for linear in find_linears(model)}
    found: list[Reading] = []
    frontier = [(value, 0)]
    while frontier:
        value, start = frontier.pop()
        if value.is_graph_output():
            return None
        for use in value.uses():
            result = use.node.outputs[0]
            if use.node in by_node and use.idx == 0:
                found.append(Reading(by_node[use.node], start))
            elif use.idx == 0 and _pools_tokens(use.node, value, shapes):
                frontier.append((result, start))
            elif is_op(use.node, "Concat") and _axis(use.node) in (-1, len(shapes[str(value.name)]) - 1):
                before = use.node.inputs[: use.idx]
                frontier.append((result, start + sum(shapes[str(one.name)][-1] for one in before if one is not None)))
            else:
                return None
    return found


def _pools_tokens(node: ir.Node, value: ir.Value, shapes: Shapes) -> bool:
    """True if each row of the result is a row of the value, or a mean of some of its rows."""
    rank = len(shapes[str(value.name)])
    if is_op(node, "Gather"):
        return _axis(node) not in (-1, rank - 1)
    if is_op(node, "Slice", "ReduceMean"):
        position = 3 if is_op(node, "Slice") else 1
        axes = constant_of(node.inputs[position]) if len(node.inputs) > position else None
        return axes is not None and not {-1, rank - 1} & {int(axis) for axis in axes.reshape(-1)}
    kept = shapes[str(node.outputs[0].name)][-1:] == shapes[str(value.name)][-1:]
    return kept and is_op(node, "Reshape", "Squeeze", "Unsqueeze", "Identity")


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


@dataclass(frozen=True)
class Gated:
    """activation(gate)·value, as SwiGLU (SiLU) and GEGLU (GELU) have it; nothing else reads `value`."""

    multiply: ir.Node
    value: Linear
    gate: Linear


def match_gated(node: ir.Node) -> Gated | None:
    """A Mul of one Linear and the activation of another."""
    if not is_op(node, "Mul"):
        return None
    for value, activated in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        gating = _activated(activated)
        linear = None if value is None else match_linear_output(value)
        gate = None if gating is None else match_linear_output(gating)
        if linear is not None and gate is not None and only_consumer(linear.output) is node:
            return Gated(node, linear, gate)
    return None


def _activated(value: ir.Value | None) -> ir.Value | None:
    """x, if `value` is Gelu(x) or x·Sigmoid(x)."""
    gelu, product = producer(value, "Gelu"), producer(value, "Mul")
    if gelu is not None:
        return gelu.inputs[0]
    sigmoids = [] if product is None else [producer(one, "Sigmoid") for one in product.inputs]
    slopes = [sigmoid.inputs[0] for sigmoid in sigmoids if sigmoid is not None]
    return slopes[0] if product is not None and slopes and slopes[0] in product.inputs else None


@dataclass(frozen=True)
class Activation:
    """A Gelu or gated product whose channels are read by Linears alone; its site is the first one's.

    Attributes:
        node: the Gelu, or the Mul by a gate.
        linears: what reads its output.
        gated: the Linear that the gate multiplies, which takes in scales of channels; None for a Gelu.
    """

    node: ir.Node
    linears: list[Linear]
    gated: Linear | None = None

    @property
    def site(self) -> str:
        """The stamped site id of the first Linear."""
        return self.linears[0].site

    @property
    def output(self) -> ir.Value:
        """The node's output, [.., K]."""
        return self.node.outputs[0]


def find_activations(model: ir.Model, shapes: Shapes) -> tuple[list[Activation], list[tuple[str, str]]]:
    """Every Gelu and gated product that Linears read, and (name, reason) of those that something else reads too."""
    found, refused = [], []
    for node in model.graph:
        gated = match_gated(node)
        opens = is_op(node, "Gelu") and all(match_gated(reader) is None for reader in node.outputs[0].consumers())
        if gated is None and not opens:
            continue
        try:
            linears = channel_readers(node.outputs[0], f"{node.op_type} {node.name}", model, shapes)
        except RefusalError as error:
            refused.append((str(node.name), str(error)))
            continue
        if linears:
            found.append(Activation(node, linears, None if gated is None else gated.value))
    return found, refused


def follows_gelu(value: ir.Value) -> bool:
    """True for a GELU's output, also where `FoldGelu` scaled its channels."""
    scaled = producer(value, "Mul")
    if scaled is not None and constant_of(scaled.inputs[1]) is not None:
        return producer(scaled.inputs[0], "Gelu") is not None
    return producer(value, "Gelu") is not None


def attention_projections(attention: Attention, model: ir.Model, shapes: Shapes) -> Projections:
    """The four Linears around an attention, if every channel of q, k, v and the context is read by it alone.

    Raises:
        RefusalError: an operand is not a Linear's output in (head, channel) order, or has another reader; or what lies
            between the scores and their softmax would not cancel a constant added to a row; or v is wider than k.
    """
    made = {}
    layouts = [("q", attention.q, (0, 2, 1, 3)), ("k", attention.k, (0, 3, 1, 2)), ("v", attention.v, (0, 2, 1, 3))]
    if all(match_rotated(trace(value, shapes).source) is not None for value in (attention.q, attention.k)):
        del layouts[:2]
    else:
        _check_score_path(attention, shapes)
    for letter, value, to_source in layouts:
        moved = trace(value, shapes)
        linear = match_linear_output(moved.source)
        index = moved.index.transpose(to_source).reshape(-1) if moved.index.ndim == 4 else None
        if linear is None or index is None or not np.array_equal(index, np.arange(len(index))):
            raise RefusalError(f"{letter} of {attention.site} is not a Linear's output in (head, channel) order")
        if len(readers(moved.source, shapes)) != 1 or len(index) != np.prod(shapes[str(moved.source.name)]):
            raise RefusalError(f"{letter} of {attention.site} has another reader")
        made[letter] = linear
    widths = {letter: len(linear.bias) for letter, linear in made.items()}
    if len(set(widths.values())) != 1:
        raise RefusalError(f"q, k and v of {attention.site} have {widths} channels, not equally many")
    context = attention.context.outputs[0]
    read = readers(context, shapes)
    proj = next((linear for linear in find_linears(model) if linear.matmul is read[0].node), None) if read else None
    if len(read) != 1 or proj is None:
        raise RefusalError(f"the context of {attention.site} is not read by one Linear alone")
    batch, heads, tokens, head_size = shapes[str(context.name)]
    straight = np.arange(batch * heads * tokens * head_size).reshape(batch, heads, tokens, head_size)
    if not np.array_equal(read[0].trace.index.reshape(-1), straight.transpose(0, 2, 1, 3).reshape(-1)):
        raise RefusalError(f"{proj.site} reads the context of {attention.site} in another order than (head, channel)")
    scores = (made["q"], made["k"]) if "q" in made else None
    return Projections(scores, made["v"], proj, heads, head_size)


def _check_score_path(attention: Attention, shapes: Shapes) -> None:
    """Adding a constant to a row of scores must only add a constant to the same row that softmax sees.

    Raises:
        RefusalError: it does not, or the scores are read elsewhere too.
    """
    value = attention.scores.outputs[0]
    while (node := only_consumer(value)) is not attention.softmax:
        if node is None:
            raise RefusalError(f"the scores of {attention.site} have another reader")
        others = [constant_of(other) for other in node.inputs if other is not value]
        result = node.outputs[0]
        allowed = (
            is_op(node, "Add")
            or (is_op(node, "Sub", "Div", "Mul") and _keeps_rows(node, value, others))
            or (is_op(node, "Where") and _only_masks(node, value))
            or (is_op(node, "Reshape") and shapes[str(value.name)][-1] == shapes[str(result.name)][-1])
        )
        if not allowed:
            raise RefusalError(
                f"{node.op_type} {node.name}, between the scores of {attention.site} and its softmax, treats the keys "
                "differently: a shift of K would not cancel"
            )
        value = result


def _keeps_rows(node: ir.Node, value: ir.Value, others: list[NDArray[np.generic] | None]) -> bool:
    """True for value − x, and for value·c and value/c with c constant along the row."""
    if node.inputs[0] is not value and not is_op(node, "Mul"):
        return False
    if is_op(node, "Sub"):
        return True
    return all(other is not None and (other.ndim == 0 or other.shape[-1] == 1) for other in others)


def _only_masks(node: ir.Node, value: ir.Value) -> bool:
    """True if Where puts a very negative constant in the place of some scores."""
    fill = constant_of(node.inputs[1 if node.inputs[2] is value else 2])
    return fill is not None and bool((fill.astype(np.float64) <= MASK_FILL).all())
