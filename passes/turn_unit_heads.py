"""Bring the heads of q and k to length 1 before they are turned (SwinV2).

    Linear(x) -> Reshape [L, T, h, d] -> Transpose 0213 -> unit heads (· factor) (-> Transpose)
 => Linear(x) -> Reshape [L, T, h, d] -> unit heads (· factor) -> Transpose

Exact. What is quantized then lies side by side, as the Linear wrote it: codes are turned in place of floats, and the
kernel library takes the division into the Linear. An operand in another form is left as it is; a second run finds
nothing new.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, only_consumer, producer, remove_dead
from mptqc.graph.match import find_attentions, match_linear_output
from mptqc.graph.shapes import dims_of
from mptqc.graph.unit_heads import UnitHeads, emit_unit_heads, match_unit_heads
from mptqc.passes.base import Pass, PassResult

_TURNED = (0, 2, 1, 3)


@dataclass(frozen=True)
class TurnUnitHeads(Pass):
    """Exchange the Transpose that parts heads with the division by their lengths."""

    name: ClassVar[str] = "turn-unit-heads"

    def call(self, model: ir.Model) -> PassResult:
        """Find all such operands, then rebuild them."""
        operands = [
            (attention.scores, index, value)
            for attention in find_attentions(model)
            for index, value in enumerate((attention.q, attention.k))
        ]
        found = [(scores, index, turned) for scores, index, value in operands if (turned := _match(value)) is not None]
        for scores, index, turned in found:
            build = Builder(scores, f"{scores.name}/{'qk'[index]}")
            y = emit_unit_heads(turned.parted, turned.unit.epsilon, turned.factor, build)
            scores.replace_input_with(index, build.op("Transpose", [y], {"perm": turned.permutation}))
        if found:
            remove_dead(model)
        return PassResult(model, len(found))


@dataclass(frozen=True)
class _Turned:
    """`parted` [L, T, h, d] is what is turned before the division; `permutation` leads from there to the operand."""

    unit: UnitHeads
    parted: ir.Value
    factor: NDArray[np.float32] | None
    permutation: list[int]


def _match(operand: ir.Value) -> _Turned | None:
    permutation = list(range(len(_TURNED)))
    while (transpose := producer(operand, "Transpose")) is not None:
        own, below = transpose.attributes.get_ints("perm", ()), transpose.inputs[0]
        if below is None or len(own) != len(_TURNED) or only_consumer(operand) is None:
            return None
        operand, permutation = below, [own[axis] for axis in permutation]
    unit = match_unit_heads(operand)
    turn = None if unit is None else producer(unit.x, "Transpose")
    if unit is None or turn is None or turn.inputs[0] is None or only_consumer(operand) is None:
        return None
    reshape = producer(turn.inputs[0], "Reshape")
    linear = None if reshape is None or reshape.inputs[0] is None else match_linear_output(reshape.inputs[0])
    if linear is None or tuple(turn.attributes.get_ints("perm", ())) != _TURNED:
        return None
    factor = unit.factor
    if factor is not None:
        dims = dims_of(unit.x)
        if factor.size != 1 and (factor.shape[-3:] != (factor.size, 1, 1) or not dims or dims[1] != factor.size):
            return None
        factor = factor.reshape(-1, 1)
    return _Turned(unit, turn.inputs[0], factor, [_TURNED[axis] for axis in permutation])
