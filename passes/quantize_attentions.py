"""Make both products of every planned attention integer products.

    MatMul(q, k) -> … Softmax -> MatMul(P, v)
 => quantizer(q) uint8, quantizer(k) int8 -> MatMulInteger -> Cast -> Mul(Δq·Δk) -> … Softmax
    -> quantizer(P) uint8, quantizer(v) int8 -> MatMulInteger -> Cast -> Mul(Δp·Δv)

The quantizers go above the Reshape and Transpose that part the heads. What lies between the first product and the
Softmax (masks, relative position bias) stays float. A second run finds the planned sites gone and says so.
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.errors import PlanError
from mptqc.graph.edit import Builder, remove_dead, replace_value
from mptqc.graph.emission import QuantizerEmitter, emit_product
from mptqc.graph.match import SITE_KEY, Attention, find_attentions
from mptqc.graph.quantizer_nodes import Operand
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.plan import AttentionPlan, QuantPlan


@dataclass(frozen=True)
class QuantizeAttentions(Pass):
    """Give each planned attention four quantizers and two integer products."""

    name: ClassVar[str] = "quantize-attentions"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.SMOOTHED,)
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Find all planned attentions, then rewrite them in graph order.

        Raises:
            PlanError: a planned attention is missing, or a quantizer does not fit 8 bits.
        """
        found = find_planned_attentions(model, self.plan)
        uses: dict[tuple[ir.Node, int], Operand] = {}
        for attention, planned in found:
            uses[attention.scores, 0] = Operand(planned.q)
            uses[attention.scores, 1] = Operand(planned.k, signed=True)
            uses[attention.context, 0] = Operand(planned.p)
            uses[attention.context, 1] = Operand(planned.v, signed=True)
        emitter = QuantizerEmitter(uses)
        for attention, planned in found:
            _quantize(attention.scores, ("q", "k"), planned, emitter)
            _quantize(attention.context, ("p", "v"), planned, emitter)
        remove_dead(model)
        return PassResult(model, 2 * len(found))


def find_planned_attentions(model: ir.Model, plan: QuantPlan) -> list[tuple[Attention, AttentionPlan]]:
    """Each planned attention with its plan, in graph order.

    Raises:
        PlanError: a planned attention is not in the model.
    """
    planned = {attention.site: attention for attention in plan.attentions}
    found = [(attention, planned[attention.site]) for attention in find_attentions(model) if attention.site in planned]
    missing = planned.keys() - {attention.site for attention, _ in found}
    if missing:
        raise PlanError(
            f"the plan quantizes {', '.join(sorted(missing))}, which the model does not have as a float attention; "
            "the plan belongs to another model, or the model is quantized already"
        )
    return found


def _quantize(matmul: ir.Node, letters: tuple[str, str], planned: AttentionPlan, emitter: QuantizerEmitter) -> None:
    name = "scores" if letters == ("q", "k") else "context"
    left, right = (emitter.codes(matmul, index, f"{planned.site}/{letter}") for index, letter in enumerate(letters))
    build = Builder(matmul, planned.site)
    scale = build.op(
        "Mul", [emitter.open_scale(left, build, f"{letters[0]}/open_scale"), right.scale], name=f"{name}_scale"
    )
    node, product = emit_product(left, right.codes, right.zero_point, scale, build, name)
    node.metadata_props[SITE_KEY] = planned.site
    replace_value(matmul.outputs[0], product)
