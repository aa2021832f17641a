"""Rotary position embedding: what exporters make of it, read as sums of channels, and the one form that mptqc gives it.

    x = Reshape(Linear(·)) [L, T, h, d]        y = x·cos + Concat(x[d/2:], x[:d/2])·sin        cos, sin [T, 1 or h, d]

Exporters slice off the tokens that have no place in the image, negate, interleave and join again. None of that is
matched: the coefficients with which each element of q and k adds the Linear's channels are pushed through it, as
`mptqc.graph.layout` does with indices.
"""

from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, constant_of, is_op, only_consumer, producer
from mptqc.graph.layout import MOVEMENT_OPS, Shapes, move
from mptqc.graph.match import Linear, match_linear_output

_MOST_TERMS = 4
"""Terms an element may have before they are summed up; a rotation leaves two."""


@dataclass(frozen=True)
class Rotary:
    """q or k [L, h, T, d] (k transposed) as a rotation of the channels of one Linear.

    Channel c of a head is column `columns[h, c]` times `cosine[t, h, c]`, plus that of its partner, half a head on,
    times `sine[t, h, c]`. `order` [h, d] says which channel of the head it was before: q and k must agree in it.
    """

    linear: Linear
    columns: NDArray[np.int64]
    order: NDArray[np.int64]
    cosine: NDArray[np.float64]
    sine: NDArray[np.float64]


def find_rotary(operand: ir.Value, layout: tuple[int, ...], shapes: Shapes) -> Rotary | None:
    """The rotation that makes an operand of scores, `layout` of [L, T, h, d]; None if it is made in another way."""
    sums = _sums_of(operand, shapes, {})
    if sums is None or sums.index.ndim != len(layout) + 1:
        return None
    linear, (rows, tokens, width) = sums.linear, shapes[str(sums.linear.output.name)]
    back = (0, *(1 + axis for axis in np.argsort(layout)))
    index, coefficient = sums.index.transpose(back), sums.coefficient.transpose(back)  # [terms, L, T, h, d]
    row = np.arange(rows * tokens).reshape(rows, tokens, 1, 1)
    if index.shape[1:3] != (rows, tokens) or ((index // width != row) & (coefficient != 0)).any():
        return None
    if index.shape[-1] % 2 or (coefficient != coefficient[:, :1]).any():
        return None
    return _paired(linear, (index % width)[:, 0], coefficient[:, 0])


@dataclass(frozen=True)
class _Sums:
    """value[i…] = Σ_k coefficient[k, i…] · linear.output.flat[index[k, i…]]"""

    linear: Linear
    index: NDArray[np.int64]
    coefficient: NDArray[np.float64]


def _sums_of(value: ir.Value, shapes: Shapes, known: dict[ir.Value, _Sums | None]) -> _Sums | None:
    """None if `value` is more than a sum of the elements of one Linear's output [L, T, N] times constants."""
    if value not in known:
        known[value] = _made_sums(value, shapes, known) if str(value.name) in shapes else None
    return known[value]


def _made_sums(value: ir.Value, shapes: Shapes, known: dict[ir.Value, _Sums | None]) -> _Sums | None:
    shape = shapes[str(value.name)]
    linear, node = match_linear_output(value), value.producer()
    if linear is not None and len(shape) == 3:
        return _Sums(linear, np.arange(int(np.prod(shape))).reshape(1, *shape), np.ones((1, *shape)))
    if node is None or not is_op(node, *MOVEMENT_OPS, "Concat", "Add", "Sub", "Mul", "Div", "Neg"):
        return None
    joined = is_op(node, "Concat", "Add", "Sub")
    operands = [one for one in node.inputs if one is not None and (joined or constant_of(one) is None)]
    parts = [part for one in operands if (part := _sums_of(one, shapes, known)) is not None]
    if len(parts) != len(operands) or any(part.linear.matmul is not parts[0].linear.matmul for part in parts):
        return None
    if is_op(node, "Concat"):
        return _joined(parts, node.attributes.get_int("axis", 0))
    if is_op(node, "Add", "Sub"):
        signs = (1.0, -1.0 if is_op(node, "Sub") else 1.0)
        if sum(len(part.index) for part in parts) > _MOST_TERMS:
            return None
        return reduce(_added, (_scaled(part, np.array(sign), shape) for part, sign in zip(parts, signs, strict=True)))
    if is_op(node, "Neg"):
        return _scaled(parts[0], np.array(-1.0), shape)
    if is_op(node, "Mul", "Div"):
        return _multiplied(node, operands, parts, shape)
    below = parts[0]
    index = [moved for part in below.index if (moved := move(node, value, part, shapes)) is not None]
    coefficient = [moved for part in below.coefficient if (moved := move(node, value, part, shapes)) is not None]
    return _Sums(below.linear, np.stack(index), np.stack(coefficient)) if index else None


def _multiplied(node: ir.Node, operands: list[ir.Value], parts: list[_Sums], shape: tuple[int, ...]) -> _Sums | None:
    """A Mul or Div by a constant."""
    if len(operands) != 1 or (is_op(node, "Div") and node.inputs[0] is not operands[0]):
        return None
    constant = constant_of(node.inputs[1] if node.inputs[0] is operands[0] else node.inputs[0])
    assert constant is not None, "the operand that is computed is the only one"
    factor = constant.astype(np.float64)
    if is_op(node, "Div") and not factor.all():
        return None
    return _scaled(parts[0], 1 / factor if is_op(node, "Div") else factor, shape)


def _scaled(sums: _Sums, factor: NDArray[np.float64], shape: tuple[int, ...]) -> _Sums:
    """Times a factor, broadcast to `shape`."""
    own, whole = sums.index.shape, (len(sums.index), *shape)
    aligned = (own[0], *(1,) * (len(whole) - len(own)), *own[1:])
    index, coefficient = sums.index.reshape(aligned), sums.coefficient.reshape(aligned) * factor
    return _Sums(sums.linear, np.broadcast_to(index, whole), np.broadcast_to(coefficient, whole))


def _added(one: _Sums, other: _Sums) -> _Sums:
    return _Sums(
        one.linear,
        np.concatenate([one.index, other.index]),
        np.concatenate([one.coefficient, other.coefficient]),
    )


def _joined(parts: list[_Sums], axis: int) -> _Sums:
    """A Concat; parts of fewer terms get some with coefficient 0."""
    most, axis = max(len(part.index) for part in parts), axis if axis < 0 else axis + 1
    wide = [
        [np.concatenate([array, np.zeros((most - len(array), *array.shape[1:]), array.dtype)]) for array in arrays]
        for arrays in ((part.index, part.coefficient) for part in parts)
    ]
    index, coefficient = (np.concatenate(arrays, axis=axis) for arrays in zip(*wide, strict=True))
    return _Sums(parts[0].linear, index, coefficient)


def _paired(linear: Linear, columns: NDArray[np.int64], coefficient: NDArray[np.float64]) -> Rotary | None:
    """The two columns of each channel, [terms, T, h, d]; None if channels do not go in pairs that share theirs."""
    heads, size = columns.shape[2:]
    order = np.zeros((heads, size), np.int64)
    own = np.zeros((heads, size), np.int64)
    for head in range(heads):
        pairs = _pairs_of(columns[:, :, head], coefficient[:, :, head])
        if pairs is None:
            return None
        order[head] = [channel for side in zip(*pairs, strict=True) for channel, _ in side]
        own[head] = [column for side in zip(*pairs, strict=True) for _, column in side]
    picked = np.take_along_axis(columns, order[None, None], -1), np.take_along_axis(coefficient, order[None, None], -1)
    cosine, sine = (
        np.where(picked[0] == wanted, picked[1], 0.0).sum(axis=0) for wanted in (own, np.roll(own, size // 2, axis=-1))
    )
    return Rotary(linear, own, order, cosine, sine) if sine.any() else None


def _pairs_of(
    columns: NDArray[np.int64], coefficient: NDArray[np.float64]
) -> list[tuple[tuple[int, int], tuple[int, int]]] | None:
    """Pairs of (channel, column) of one head, [terms, T, d]: both channels of a pair are sums of its two columns."""
    sharing: dict[tuple[int, ...], list[int]] = {}
    for channel in range(columns.shape[-1]):
        used = columns[..., channel][coefficient[..., channel] != 0]
        sharing.setdefault(tuple(np.unique(used).tolist()), []).append(channel)
    pairs, alone = [], []
    for used, channels in sharing.items():
        if len(used) == 1 and len(channels) == 1:
            alone.append((channels[0], used[0]))
        elif len(used) == 2 and len(channels) == 2:
            pairs.append(((channels[0], used[0]), (channels[1], used[1])))
        else:
            return None
    half = len(alone) // 2
    return sorted(pairs + list(zip(alone[:half], alone[half:], strict=True)))


def emit_rotary(
    found: Rotary, scale: float, cosine: ir.Value, sine: ir.Value, layout: tuple[int, ...], build: Builder
) -> ir.Value:
    """The operand in mptqc's form, its Linear multiplied by `scale`; `cosine`, `sine` [T, 1 or h, d] are constants."""
    linear, columns = found.linear, found.columns.reshape(-1)
    weight = build.constant("weight", (linear.weight[:, columns] * scale).astype(np.float32))
    bias = build.constant("bias", (linear.bias[columns] * scale).astype(np.float32))
    heads, size = found.columns.shape
    shifted = build.op("Add", [build.op("MatMul", [linear.input, weight]), bias])
    x = build.op("Reshape", [shifted, build.constant("heads", np.array([0, 0, heads, size], np.int64))])
    halves = build.constant("halves", np.array([size // 2, size // 2], np.int64))
    split = build.node("Split", [x, halves], {"axis": -1}, num_outputs=2)
    swapped = build.op("Concat", [split.outputs[1], split.outputs[0]], {"axis": -1})
    terms = [build.op("Mul", [x, cosine], name="by_cosine"), build.op("Mul", [swapped, sine], name="by_sine")]
    return build.op("Transpose", [build.op("Add", terms, name="rotated")], {"perm": list(layout)})


@dataclass(frozen=True)
class RotatedHeads:
    """mptqc's own form, behind `x` [L, T, h, d]: `output` is x·cosine + swapped halves·sine."""

    x: ir.Value
    cosine: ir.Value
    sine: ir.Value
    output: ir.Value


def match_rotated(output: ir.Value) -> RotatedHeads | None:
    """The rotation whose result is `output`, in the form of `emit_rotary`; None if it is something else."""
    add = producer(output, "Add")
    terms = [producer(value, "Mul") for value in add.inputs] if add is not None else [None, None]
    if add is None or terms[0] is None or terms[1] is None:
        return None
    (x, cosine), (swapped, sine) = terms[0].inputs, terms[1].inputs
    concat = producer(swapped, "Concat")
    split = None if concat is None else producer(concat.inputs[0], "Split")
    if x is None or cosine is None or sine is None or concat is None or split is None or split.inputs[0] is not x:
        return None
    if list(concat.inputs) != [split.outputs[1], split.outputs[0]] or len(split.outputs) != 2:
        return None
    tables = [constant_of(cosine), constant_of(sine)]
    sizes = constant_of(split.inputs[1]) if len(split.inputs) > 1 else None
    if any(table is None or table.ndim != 3 for table in tables) or set(x.consumers()) != {terms[0], split}:
        return None
    if sizes is None or sizes.size != 2 or sizes[0] != sizes[1]:
        return None
    alone = all(only_consumer(value) is not None for value in (*add.inputs, swapped) if value is not None)
    last = all(node.attributes.get_int("axis", 0) == -1 for node in (concat, split))
    return RotatedHeads(x, cosine, sine, output) if alone and last else None
