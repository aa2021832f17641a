"""Store integer weights in k/8 bytes each.

    W int8 [K, N]
 => planes uint8 -> Cast -> Gather(table) -> (Slice ->) Reshape [K, N], summed over the planes

and of a weight that a trellis codes, the planes of its codes (of 4 bits, the bytes of two codes), and behind them

    codes int8 [K, 1, N] -> Cast -> Conv -> Cast -> Gather(table) -> Reshape [K, N]

ONNX Runtime computes these constants once, when the session is created. 8-bit weights stay as they are.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, constant_of, is_op, remove_dead
from mptqc.graph.emission import weight_bits_of
from mptqc.graph.match import site_of
from mptqc.graph.packed_weights import emit_packed, emit_trellis
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.plan import QuantPlan
from mptqc.reference.packing import MAX_BITS


@dataclass(frozen=True)
class PackWeights(Pass):
    """Pack the weights of every integer Linear to its number of bits; the model is quantized after it."""

    name: ClassVar[str] = "pack-weights"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.SMOOTHED,)
    ensures: ClassVar[Stage | None] = Stage.QUANTIZED
    plan: QuantPlan | None = None
    """Where the codes of weights are that a trellis codes; None if there are no such weights."""

    def call(self, model: ir.Model) -> PassResult:
        """Find all products whose weights have less than 8 bits, then pack those."""
        found = [node for node in find_integer_linears(model) if weight_bits_of(node) < MAX_BITS]
        by_trellis = {} if self.plan is None else _codes_by_site(self.plan)
        for node in found:
            weight = constant_of(node.inputs[1])
            assert weight is not None
            build, bits = Builder(node, f"{site_of(node)}/unpack"), weight_bits_of(node)
            if (codes := by_trellis.get(site_of(node))) is not None:
                packed = emit_trellis(codes, bits, build)
            else:
                packed = emit_packed(weight.astype(np.int8, copy=False), bits, build)
            node.replace_input_with(1, packed)
        remove_dead(model)
        return PassResult(model, len(found))


def _codes_by_site(plan: QuantPlan) -> dict[str, NDArray[np.int8] | None]:
    """By site, the planned codes of the weights that a trellis codes."""
    return {layer.site: plan.codes(layer.site) for layer in plan.layers if layer.trellis}


def find_integer_linears(model: ir.Model) -> list[ir.Node]:
    """MatMulInteger nodes with constant weights that the quantize passes wrote, in graph order."""
    return [
        node
        for node in model.graph
        if is_op(node, "MatMulInteger") and site_of(node) and constant_of(node.inputs[1]) is not None
    ]
