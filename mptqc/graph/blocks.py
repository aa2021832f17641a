"""Who may be compensated: the Linears that read a norm, and the four Linears around an attention."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mptqc.errors import RefusalError
from mptqc.graph.layout import Shapes, readers, trace
from mptqc.graph.match import Attention, Linear, Norm, find_linears, match_linear_output


@dataclass(frozen=True)
class Projections:
    """The Linears that make q, k, v, [C -> heads·head_size] ordered (head, channel), and the one after the context."""

    q: Linear
    k: Linear
    v: Linear
    proj: Linear
    heads: int
    head_size: int


def norm_readers(norm: Norm, model: ir.Model, shapes: Shapes) -> list[Linear]:
    """The Linears that read this norm's channels, in order; empty if nothing but the model's output does.

    Raises:
        RefusalError: something that cannot be compensated reads the norm too.
    """
    by_node = {linear.matmul: linear for linear in find_linears(model)}
    width = len(norm.gamma)
    found = []
    for reader in readers(norm.output, shapes):
        linear = None if reader.node is None else by_node.get(reader.node)
        if linear is None or reader.value is not linear.input:
            what = "the model's output" if reader.node is None else f"{reader.node.op_type} {reader.node.name}"
            raise RefusalError(f"{norm.site} is also read by {what}, which cannot be compensated")
        channels = reader.trace.channels(shapes)
        if channels.shape[-1] != width or not np.array_equal(
            channels, np.broadcast_to(np.arange(width), channels.shape)
        ):
            raise RefusalError(f"{linear.site} reads the channels of {norm.site} in another order")
        found.append(linear)
    return found


def attention_projections(attention: Attention, model: ir.Model, shapes: Shapes) -> Projections:
    """The four Linears around an attention, if every channel of q, k, v and the context is read by it alone.

    Raises:
        RefusalError: an operand is not a Linear's output in (head, channel) order, or has another reader.
    """
    made = {}
    layouts = (("q", attention.q, (0, 2, 1, 3)), ("k", attention.k, (0, 3, 1, 2)), ("v", attention.v, (0, 2, 1, 3)))
    for letter, value, to_source in layouts:
        moved = trace(value, shapes)
        linear = match_linear_output(moved.source)
        index = moved.index.transpose(to_source).reshape(-1) if moved.index.ndim == 4 else None
        if linear is None or index is None or not np.array_equal(index, np.arange(len(index))):
            raise RefusalError(f"{letter} of {attention.site} is not a Linear's output in (head, channel) order")
        if len(readers(moved.source, shapes)) != 1 or len(index) != np.prod(shapes[str(moved.source.name)]):
            raise RefusalError(f"{letter} of {attention.site} has another reader")
        made[letter] = linear
    context = attention.context.outputs[0]
    read = readers(context, shapes)
    proj = next((linear for linear in find_linears(model) if linear.matmul is read[0].node), None) if read else None
    if len(read) != 1 or proj is None:
        raise RefusalError(f"the context of {attention.site} is not read by one Linear alone")
    batch, heads, tokens, head_size = shapes[str(context.name)]
    straight = np.arange(batch * heads * tokens * head_size).reshape(batch, heads, tokens, head_size)
    if not np.array_equal(read[0].trace.index.reshape(-1), straight.transpose(0, 2, 1, 3).reshape(-1)):
        raise RefusalError(f"{proj.site} reads the context of {attention.site} in another order than (head, channel)")
    return Projections(made["q"], made["k"], made["v"], proj, heads, head_size)
