"""Divide each row of attention probabilities by its largest, and give that back to the product with v.

    P = Softmax(s);  P·v    =>    r = ReduceMax(P);  E = P/r;  (E·v)·r

P [.., T, S], r [.., T, 1]. A row's largest probability is anything from 1/S to 1, so that one scale for all rows leaves
most of them a few codes; E reaches from 0 to 1 in every row. Exact in real arithmetic. The stage does not change; a
second run finds nothing new.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder
from mptqc.graph.match import Attention, find_attentions
from mptqc.passes.base import Pass, PassResult, Stage


@dataclass(frozen=True)
class ScaleProbabilities(Pass):
    """Give every row of every softmax that is multiplied with v a scale of its own."""

    name: ClassVar[str] = "scale-probabilities"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.SMOOTHED,)

    def call(self, model: ir.Model) -> PassResult:
        """Find the attentions that have none yet, then scale their rows."""
        found = [attention for attention in find_attentions(model) if attention.row_scale is None]
        for attention in found:
            _scale_rows(attention)
        return PassResult(model, len(found))


def _scale_rows(attention: Attention) -> None:
    context, probabilities = attention.context, attention.p
    build = Builder(context, attention.site)
    last = build.constant("last_axis", np.array([-1], np.int64))
    largest = build.op("ReduceMax", [probabilities, last], {"keepdims": 1}, name="row_maximum")
    scaled = build.op("Div", [probabilities, largest], name="row_scaled")
    largest.dtype = scaled.dtype = ir.DataType.FLOAT
    scaled.shape = probabilities.shape
    if probabilities.shape is not None:
        largest.shape = ir.Shape([*probabilities.shape[:-1], 1])
    product = context.outputs[0]
    readers = list(product.uses())
    after = ir.node("Mul", [product, largest], name=f"{attention.site}/row_restored")
    # The product's name stays with what its readers see.
    after.outputs[0].name, product.name = product.name, f"{attention.site}/row_scaled_context"
    after.outputs[0].shape, after.outputs[0].type = product.shape, product.type
    assert isinstance(context.graph, ir.Graph)
    context.replace_input_with(0, scaled)
    context.graph.insert_after(context, after)
    for use in readers:
        use.node.replace_input_with(use.idx, after.outputs[0])
