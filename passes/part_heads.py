"""Give attentions that have batch and heads in one axis an axis for each.

    q, k, v [B·H, T, d] → products and softmax [B·H, T, S]        →        Reshape → [B, H, T, d] → … → Reshape

as torch's `baddbmm` makes them (MultiheadAttention with its weights, older exports of CLIP). What is added to the
scores must be constant, the same for all images and heads.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder, add_initializer, constant_of, is_op, only_consumer, remove_dead, replace_value
from mptqc.graph.layout import Shapes
from mptqc.graph.match import Attention, find_attentions
from mptqc.graph.shapes import dims_of
from mptqc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class PartHeads(Pass):
    """Part the axis of every attention of three axes whose batch is one dimension of it. One run is a fixpoint.

    Attributes:
        one: the shape of every value at batch 1 (or at the model's own batch).
        two: the same at batch 2.
    """

    name: ClassVar[str] = "part-heads"
    one: Shapes
    two: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Find all such attentions, then part their operands and join their contexts."""
        dims = dims_of(model.graph.inputs[0])
        batch = dims[0] if dims and isinstance(dims[0], int) else None
        found = [(attention, heads) for attention in find_attentions(model) if (heads := self._heads(attention, batch))]
        for attention, heads in found:
            _part(attention, heads, self.one)
        if found:
            remove_dead(model)
        return PassResult(model, len(found))

    def _heads(self, attention: Attention, batch: int | None) -> int:
        """How many heads share an axis with the batch; 0 if the attention has another form."""
        values = [attention.q, attention.k, attention.v, attention.scores.outputs[0], attention.context.outputs[0]]
        shapes = [(self.one.get(str(value.name)), self.two.get(str(value.name))) for value in values]
        if any(one is None or two is None or len(one) != 3 for one, two in shapes):
            return 0
        firsts = {(one[0], two[0]) for one, two in shapes if one is not None and two is not None}
        one, two = firsts.pop()
        images = (1, 2) if batch is None else (batch, batch)
        heads = one // images[0]
        return (
            heads if not firsts and (one, two) == (heads * images[0], heads * images[1]) and _is_plain(attention) else 0
        )


def _is_plain(attention: Attention) -> bool:
    """True if nothing but constants of a row or of all rows is added between the scores and their softmax."""
    value = attention.scores.outputs[0]
    while (node := only_consumer(value)) is not attention.softmax:
        if node is None or not is_op(node, "Add", "Mul", "Div"):
            return False
        other = constant_of(node.inputs[1] if node.inputs[0] is value else node.inputs[0])
        if other is None or (other.ndim == 3 and other.shape[0] != 1) or other.ndim > 3:
            return False
        value = node.outputs[0]
    return True


def _part(attention: Attention, heads: int, shapes: Shapes) -> None:
    for node, index in ((attention.scores, 0), (attention.scores, 1), (attention.context, 1)):
        operand = node.inputs[index]
        assert operand is not None
        build = Builder(node, f"{node.name}/heads")
        target = build.constant("parted", np.array([-1, heads, *shapes[str(operand.name)][1:]], np.int64))
        node.replace_input_with(index, build.op("Reshape", [operand, target], name=f"part{index}"))
    context = attention.context.outputs[0]
    between: ir.Value = attention.scores.outputs[0]
    while between is not attention.softmax.outputs[0]:  # three axes no more
        between.shape = None
        reader = only_consumer(between)
        assert reader is not None
        between = reader.outputs[0]
    between.shape = None
    graph = attention.context.graph
    assert isinstance(graph, ir.Graph)
    name = f"{attention.context.name}/heads/join"
    target = add_initializer(graph, f"{name}/shape", np.array([-1, *shapes[str(context.name)][1:]], np.int64))
    joined = ir.val(name, type=context.type, shape=context.shape)
    join = ir.node("Reshape", [None, target], outputs=[joined], name=name)
    graph.insert_after(attention.context, join)
    replace_value(context, joined)
    join.replace_input_with(0, context)
    context.shape = None
