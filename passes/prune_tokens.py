"""Compute only the tokens that are read: a head that reads the class token leaves the last block's other rows unused.

    x [B, T, C] -> LayerNormalization -> Gather(0, axis=1)
 => Slice(x, tokens 0:1) [B, 1, C] -> LayerNormalization -> Gather(0, axis=1)

and so on upwards, through all that treats tokens one by one: norms, residual sums, Linears, Gelu, and in attention the
rows of P, of the scores and of q. It ends at values that someone else needs whole: the keys' and values' input and the
residual stream before the last block. Rows are only left out, so what remains changes by rounding at most (a product
of fewer rows may be summed in another order). A second run finds nothing new.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, add_initializer, constant_of, is_op, remove_dead, replace_value, set_initializer
from mptqc.graph.layout import Shapes
from mptqc.passes.base import Pass, PassResult, Stage

TOKEN_AXIS = 1
LARGEST_SHARE = 0.5
"""Of the tokens; where more are read, computing them all is as good."""

ELEMENTWISE = ("Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "HardSwish", "LeakyRelu", "Identity", "Cast", "Neg", "Sqrt")
BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "Where")


@dataclass(frozen=True)
class Tokens:
    """The `positions` along `axis` of a value that are read, ascending."""

    axis: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class PruneTokens(Pass):
    """Leave out the rows of tokens that nothing reads. Runs after `SeparateProjections`, on float models."""

    name: ClassVar[str] = "prune-tokens"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.RAW, Stage.CANONICAL, Stage.NORMS_SMOOTHED, Stage.SMOOTHED)
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Find every value that is read in part, then make and read it in part; an edit is one such value."""
        partial = find_partial_values(model, self.shapes)
        cuts: dict[tuple[ir.Value, Tokens], ir.Value] = {}
        for node in list(model.graph):
            output = node.outputs[0] if node.outputs else None
            if output in partial:
                _narrow(node, partial[output], partial, self.shapes, cuts)
            else:
                _renumber(node, partial, self.shapes)
        if partial:
            remove_dead(model)
        return PassResult(model, len(partial))


def find_partial_values(model: ir.Model, shapes: Shapes) -> dict[ir.Value, Tokens]:
    """Every computed value of which only some tokens are read, in reverse graph order."""
    batch = model.graph.inputs[0].shape
    fixed_batch = batch is not None and isinstance(batch[0], int)
    asked: dict[tuple[ir.Node, int], Tokens] = {}
    partial: dict[ir.Value, Tokens] = {}
    for node in reversed(model.graph):
        chosen = _chosen(node, shapes)
        if chosen is not None:
            asked[node, 0] = Tokens(TOKEN_AXIS, tuple(np.unique(chosen).tolist()))
            continue
        tokens = _read_tokens(node, asked, shapes)
        axes = None if tokens is None else _operand_axes(node, tokens.axis, shapes, fixed_batch=fixed_batch)
        if tokens is None or axes is None:
            continue
        partial[node.outputs[0]] = tokens
        asked |= {(node, index): Tokens(axis, tokens.positions) for index, axis in axes.items()}
    return partial


def _chosen(node: ir.Node, shapes: Shapes) -> NDArray[np.int64] | None:
    """The tokens of its input [B, T, C] that a constant Gather or Slice takes, in the output's order and shape."""
    if not is_op(node, "Gather", "Slice"):
        return None
    shape = _shape(node.inputs[0], shapes)
    if shape is None or len(shape) != 3:
        return None
    all_tokens = np.arange(shape[TOKEN_AXIS], dtype=np.int64)
    if is_op(node, "Gather"):
        indices = constant_of(node.inputs[1])
        axis = node.attributes.get_int("axis", 0)
        return None if indices is None or axis % 3 != TOKEN_AXIS else all_tokens[indices.astype(np.int64)]
    bounds = [constant_of(value) for value in node.inputs[1:]]
    if len(bounds) < 3 or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    start, end, axis, *step = (int(np.asarray(bound).reshape(-1)[0]) for bound in bounds)
    if axis % 3 != TOKEN_AXIS or (step and step[0] < 0):
        return None
    return all_tokens[start : end : step[0] if step else 1]


def _read_tokens(node: ir.Node, asked: Mapping[tuple[ir.Node, int], Tokens], shapes: Shapes) -> Tokens | None:
    """What the readers of a node's output ask for together; None if that is (nearly) all, or not known."""
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return None
    output = node.outputs[0]
    shape = _shape(output, shapes)
    requests = [asked.get((use.node, use.idx)) for use in output.uses()]
    if shape is None or not requests or requests[0] is None:
        return None
    axis = requests[0].axis
    positions: set[int] = set()
    for request in requests:
        if request is None or request.axis != axis:
            return None
        positions.update(request.positions)
    if not positions or len(positions) > LARGEST_SHARE * shape[axis]:
        return None
    return Tokens(axis, tuple(sorted(positions)))


def _operand_axes(node: ir.Node, axis: int, shapes: Shapes, *, fixed_batch: bool) -> dict[int, int] | None:
    """Which inputs need only the rows that are wanted of the output, as {input: its token axis}.

    None if the node mixes tokens, or is not known not to.
    """
    shape = _shape(node.outputs[0], shapes)
    assert shape is not None
    if is_op(node, *ELEMENTWISE):
        return {0: axis}
    if is_op(node, "LayerNormalization", "Softmax"):
        return {0: axis} if axis < node.attributes.get_int("axis", -1) % len(shape) else None
    if is_op(node, "ReduceMax") and node.attributes.get_int("keepdims", 1) == 1:
        axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        return {0: axis} if axes is not None and axis not in {int(own) % len(shape) for own in axes} else None
    if is_op(node, "Transpose"):
        permutation = node.attributes.get_ints("perm", None)
        return {0: len(shape) - 1 - axis if permutation is None else permutation[axis]}
    if is_op(node, "MatMul"):
        left, right = _shape(node.inputs[0], shapes), _shape(node.inputs[1], shapes)
        if left is None or right is None or min(len(left), len(right)) < 2:
            return None
        if constant_of(node.inputs[1]) is not None and len(right) == 2 and axis < len(shape) - 1:
            return {0: axis}
        if axis != len(shape) - 2:
            return None
        return {0: len(left) - 2}
    if is_op(node, *BROADCASTING):
        return _broadcast_axes(node, axis, shape, shapes)
    if is_op(node, "Reshape") and axis == TOKEN_AXIS and _keeps_tokens(node, shapes, fixed_batch=fixed_batch):
        return {0: axis}
    return None


def _broadcast_axes(node: ir.Node, axis: int, shape: tuple[int, ...], shapes: Shapes) -> dict[int, int] | None:
    axes = {}
    for index, value in enumerate(node.inputs):
        own_shape = _shape(value, shapes)
        if own_shape is None:
            return None
        own = axis - (len(shape) - len(own_shape))
        if own >= 0 and own_shape[own] == shape[axis]:
            axes[index] = own
    return axes


def _keeps_tokens(reshape: ir.Node, shapes: Shapes, *, fixed_batch: bool) -> bool:
    """True for [B, T, …] -> [B, T, …] at every batch size: B is copied, inferred, or fixed."""
    before, after = _shape(reshape.inputs[0], shapes), _shape(reshape.outputs[0], shapes)
    target = constant_of(reshape.inputs[1])
    if before is None or after is None or target is None or before[: TOKEN_AXIS + 1] != after[: TOKEN_AXIS + 1]:
        return False
    return fixed_batch or int(target[0]) in (0, -1)


def _narrow(
    node: ir.Node,
    tokens: Tokens,
    partial: Mapping[ir.Value, Tokens],
    shapes: Shapes,
    cuts: dict[tuple[ir.Value, Tokens], ir.Value],
) -> None:
    """Make `node` compute these tokens only."""
    axes = _operand_axes(node, tokens.axis, shapes, fixed_batch=True)
    assert axes is not None
    for index, axis in axes.items():
        operand = node.inputs[index]
        assert operand is not None
        wanted = Tokens(axis, tokens.positions)
        if partial.get(operand) != wanted:
            if (operand, wanted) not in cuts:
                cuts[operand, wanted] = _cut(operand, wanted, partial.get(operand), node)
            node.replace_input_with(index, cuts[operand, wanted])
    if is_op(node, "Reshape"):
        target = constant_of(node.inputs[1])
        assert target is not None
        if target[TOKEN_AXIS] not in (0, -1):
            narrowed = target.copy()
            narrowed[TOKEN_AXIS] = len(tokens.positions)
            set_initializer(node, 1, narrowed)
    node.outputs[0].shape = _narrow_shape(node.outputs[0], tokens)


def _narrow_shape(value: ir.Value, tokens: Tokens) -> ir.Shape | None:
    if value.shape is None:
        return None
    return ir.Shape([len(tokens.positions) if axis == tokens.axis else dim for axis, dim in enumerate(value.shape)])


def _cut(operand: ir.Value, wanted: Tokens, held: Tokens | None, reader: ir.Node) -> ir.Value:
    """The wanted tokens of a value: a smaller constant, or a Slice (a Gather if they are not in a row)."""
    positions = np.array(wanted.positions if held is None else np.searchsorted(held.positions, wanted.positions))
    constant = constant_of(operand)
    if constant is not None:
        assert isinstance(reader.graph, ir.Graph)
        return add_initializer(reader.graph, f"{operand.name}/tokens", np.take(constant, positions, axis=wanted.axis))
    build = Builder(reader, f"{operand.name}/tokens")
    if positions[-1] - positions[0] + 1 == len(positions):
        bounds = {"starts": positions[0], "ends": positions[-1] + 1, "axes": wanted.axis}
        inputs = [build.constant(name, np.array([bound], np.int64)) for name, bound in bounds.items()]
        cut = build.op("Slice", [operand, *inputs])
    else:
        indices = build.constant("indices", positions.astype(np.int64))
        cut = build.op("Gather", [operand, indices], {"axis": wanted.axis})
    cut.shape, cut.type = _narrow_shape(operand, wanted), operand.type
    return cut


def _renumber(node: ir.Node, partial: Mapping[ir.Value, Tokens], shapes: Shapes) -> None:
    """Let a Gather or Slice take its tokens from a value that holds fewer of them now."""
    chosen = _chosen(node, shapes)
    data = node.inputs[0] if node.inputs else None
    if chosen is None or data is None or data not in partial:
        return
    positions = np.searchsorted(partial[data].positions, chosen).astype(np.int64)
    if is_op(node, "Gather") and np.array_equal(positions, chosen):
        return
    if is_op(node, "Gather"):
        set_initializer(node, 1, positions)
    elif np.array_equal(positions, np.arange(len(partial[data].positions))):
        replace_value(node.outputs[0], data)
    else:
        build = Builder(node, f"{node.outputs[0].name}/tokens")
        indices = build.constant("indices", positions)
        replace_value(node.outputs[0], build.op("Gather", [data, indices], {"axis": TOKEN_AXIS}))


def _shape(value: ir.Value | None, shapes: Shapes) -> tuple[int, ...] | None:
    constant = constant_of(value)
    if constant is not None:
        return constant.shape
    return None if value is None else shapes.get(str(value.name))
