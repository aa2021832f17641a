"""Give q and k of an attention with rotary position embedding a Linear each, and the rotation one form.

    Linear(x) [L, T, 3C] -> any movement, sums and products with constants -> q [L, h, T, d], k [L, h, d, T]
 => Linear_q(x) -> Reshape [0, 0, h, d] -> ·cos + swapped halves·sin -> Transpose 0213 -> q,  k: Transpose 0231

The channels of a head are ordered so that each one's partner lies half a head on; q and k alike, so that their
product stays. A common factor of the rotation (1/√d) goes to the Linear: q, k and all blocks then share their cos and
sin. Exact in real arithmetic. What is no such rotation is left as it is. A second run finds the form that it makes.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, add_initializer, producer, remove_dead
from mptqc.graph.layout import Shapes
from mptqc.graph.match import Attention, find_attentions, match_linear_output
from mptqc.graph.rotary import Rotary, emit_rotary, find_rotary, match_rotated
from mptqc.passes.base import Pass, PassResult
from mptqc.passes.separate_projections import KEY_LAYOUT, QUERY_LAYOUT

SAME = 2.0**-22
"""Two tables are one if they differ by no more, relative to their largest: float32 rounds 1 to 2^-24."""


@dataclass(frozen=True)
class CanonicaliseRotary(Pass):
    """Rebuild rotated q and k."""

    name: ClassVar[str] = "canonicalise-rotary"
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Find all rotations, then rebuild them."""
        found = [(attention, pair) for attention in find_attentions(model) if (pair := self._find(attention))]
        tables: list[ir.Value] = []
        for attention, (q, k) in found:
            _rebuild(attention.scores, 0, q, QUERY_LAYOUT, tables)
            _rebuild(attention.scores, 1, k, KEY_LAYOUT, tables)
        if found:
            remove_dead(model)
        return PassResult(model, 2 * len(found))

    def _find(self, attention: Attention) -> tuple[Rotary, Rotary] | None:
        if _is_canonical(attention.q) and _is_canonical(attention.k):
            return None
        q = find_rotary(attention.q, QUERY_LAYOUT, self.shapes)
        k = find_rotary(attention.k, KEY_LAYOUT, self.shapes)
        if q is None or k is None or not np.array_equal(q.order, k.order):
            return None
        return q, k


def _is_canonical(operand: ir.Value) -> bool:
    """True for the rotated heads of a Linear of its own."""
    transpose = producer(operand, "Transpose")
    rotated = None if transpose is None or transpose.inputs[0] is None else match_rotated(transpose.inputs[0])
    reshape = None if rotated is None else producer(rotated.x, "Reshape")
    return reshape is not None and reshape.inputs[0] is not None and match_linear_output(reshape.inputs[0]) is not None


def _rebuild(scores: ir.Node, index: int, found: Rotary, layout: tuple[int, ...], tables: list[ir.Value]) -> None:
    """Only the scores read the new operand: its channels may have another order, which q and k share."""
    assert isinstance(scores.graph, ir.Graph)
    scale = _common_factor(found)
    arrays = [_of_all_heads(each / scale) for each in (found.cosine, found.sine)]
    if any(each.shape != arrays[0].shape for each in arrays):
        arrays = [found.cosine / scale, found.sine / scale]
    cosine, sine = (
        _table(scores.graph, name, array, tables) for name, array in zip(("cosine", "sine"), arrays, strict=True)
    )
    build = Builder(scores, f"{found.linear.matmul.name}/{'qk'[index]}")
    scores.replace_input_with(index, emit_rotary(found, scale, cosine, sine, layout, build))


def _of_all_heads(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """The table [T, h, d] as [T, 1, d] if all heads have the same."""
    return array[:, :1] if np.array_equal(np.broadcast_to(array[:, :1], array.shape), array) else array


def _common_factor(found: Rotary) -> float:
    """The length to which every pair of channels is rotated, 1 if they differ."""
    lengths = np.hypot(found.cosine, found.sine)
    first = float(lengths.flat[0])
    return first if first > 0 and np.allclose(lengths, first, rtol=SAME, atol=0) else 1.0


def _table(graph: ir.Graph, name: str, array: NDArray[np.float64], tables: list[ir.Value]) -> ir.Value:
    """The table [T, 1 or h, d] as an initializer; one that says the same is taken again."""
    for table in tables:
        assert table.const_value is not None
        known = table.const_value.numpy()
        if known.shape == array.shape and np.allclose(known, array, rtol=0, atol=SAME * np.abs(array).max()):
            return table
    tables.append(add_initializer(graph, f"mptqc/rotary_{name}", array.astype(np.float32)))
    return tables[-1]
