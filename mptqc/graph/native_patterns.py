"""What each operator of `ai.mptqc` replaces in a quantized model; finding never edits.

A candidate that the operator cannot express raises `RefusalError`, which says what was found where: it keeps its
portable form. Movement is never matched op by op: indices are pushed through it (`mptqc.graph.layout`).
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import RefusalError
from mptqc.graph.edit import constant_of, is_op, only_consumer, scalar_of
from mptqc.graph.integer_products import IntegerProduct
from mptqc.graph.layout import MOVEMENT_OPS, Reader, Shapes, readers, trace
from mptqc.graph.match import Norm
from mptqc.graph.quantizer_match import (
    LEAST_SCALE,
    MOST_SCALE,
    FoundQuantizer,
    match_quantizer,
    match_reader,
    quantizers_of,
)
from mptqc.reference.custom_ops import patches

MOST_TERMS = 32768
"""The operators sum at most so many products of codes in 32 bits."""

# Movement that keeps the order of the elements.
_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_MOST_ADDITIONS = 2
_DEFAULT_EPSILON = 1e-5  # of LayerNormalization


@dataclass(frozen=True)
class Batches:
    """Concrete shapes at two batch sizes; the same where the model's batch is fixed."""

    one: Shapes
    two: Shapes

    def of(self, value: ir.Value) -> tuple[int, ...]:
        """The shape at the larger batch, at which movement is traced."""
        return self.two[str(value.name)]

    def target(self, value: ir.Value) -> NDArray[np.int64]:
        """What a Reshape is given to make the shape of `value` at any batch.

        Raises:
            RefusalError: more than one dimension grows with the batch.
        """
        small, large = self.one[str(value.name)], self.two[str(value.name)]
        target = np.array([-1 if one != two else two for one, two in zip(small, large, strict=True)], np.int64)
        if (target == -1).sum() > 1:
            raise RefusalError(f"more than one dimension of {value.name} {small} grows with the batch")
        return target

    def row_table(self, index: NDArray[np.int64], value: ir.Value) -> NDArray[np.int64]:
        """Which row of each group of R a movement puts where: row r comes from row table[r], [R], the smallest R.

        `index` are the positions in `value` [.., C] that its elements come from; R is 1 if no row moves.

        Raises:
            RefusalError: rows are split, dropped or repeated, or move from one image to another.
        """
        width = self.of(value)[-1]
        if index.shape[-1:] != (width,) or (index % width != np.arange(width)).any():
            raise RefusalError(f"the movement behind {value.name} does not keep its channels together")
        rows = index.reshape(-1, width)[:, 0] // width
        if not np.array_equal(np.sort(rows), np.arange(np.prod(self.of(value)[:-1], dtype=np.int64))):
            raise RefusalError(f"the movement behind {value.name} drops or repeats rows")
        for size in _divisors(int(np.prod(self.one[str(value.name)][:-1]))):
            grouped = rows.reshape(-1, size)
            table: NDArray[np.int64] = grouped[0]
            if np.array_equal(grouped, table + size * np.arange(len(grouped))[:, None]):
                return table
        raise RefusalError(f"the movement behind {value.name} mixes images")


@dataclass(frozen=True)
class AttentionPattern:
    """Both products of an attention, from the codes of q, k and v to `targets`, where the heads lie side by side.

    `added` are what is added to the scores, [W, 1 or H, 1 or T, S] each; `output` quantizes the context, if all
    that reads it is quantized alike.
    """

    scores: IntegerProduct
    context: IntegerProduct
    heads: int
    q: FoundQuantizer
    k: FoundQuantizer
    v: FoundQuantizer
    p: FoundQuantizer
    added: tuple[NDArray[np.float32], ...]
    output: FoundQuantizer | None
    targets: tuple[ir.Value, ...]


def match_attention(scores: IntegerProduct, context: IntegerProduct, shapes: Batches) -> AttentionPattern:
    """Read the attention around two products.

    Raises:
        RefusalError: it is not what the operator computes.
    """
    shape = shapes.of(scores.output)
    if len(shape) != 4 or (shapes.target(scores.output)[1:] == -1).any():
        raise RefusalError(f"its scores have shape {shape}, not [batch, heads, tokens, tokens]")
    if max(shape[3], shapes.of(scores.left)[3]) > MOST_TERMS:
        raise RefusalError(f"it sums more than {MOST_TERMS} products")
    added, softmax = _score_path(scores, shapes)
    quantizers = quantizers_of(softmax.outputs[0])
    if quantizers is None or len(quantizers) != 1 or shapes.of(softmax.outputs[0]) != shape:
        raise RefusalError(f"{softmax.name} is not read by one quantizer alone")
    p = quantizers[0]
    if p.signed or context.left is not p.codes or only_consumer(p.codes) is not context.node:
        raise RefusalError(f"the codes of {softmax.name} are not read by the product with v alone")
    if not p.agrees(context.left_scale, context.left_zero):
        raise RefusalError(f"the product with v does not take the codes of {softmax.name} as they are made")
    q = _operand("q", scores.left, (0, 2, 1, 3), shapes)
    k = _operand("k", scores.right, (0, 3, 1, 2), shapes)
    v = _operand("v", context.right, (0, 2, 1, 3), shapes)
    for letter, found, scale, zero_point in (
        ("q", q, scores.left_scale, scores.left_zero),
        ("k", k, scores.right_scale, scores.right_zero),
        ("v", v, context.right_scale, context.right_zero),
    ):
        if not found.agrees(scale, zero_point):
            raise RefusalError(f"its product does not take the codes of {letter} as they are made")
    output, targets = _joined_heads(context.output, shapes)
    return AttentionPattern(scores, context, shape[1], q, k, v, p, added, output, targets)


def _score_path(scores: IntegerProduct, shapes: Batches) -> tuple[tuple[NDArray[np.float32], ...], ir.Node]:
    """What is added to the scores, in order, and the Softmax that reads them."""
    added: list[NDArray[np.float32]] = []
    value = scores.output
    while True:
        node = only_consumer(value)
        if node is None:
            raise RefusalError(f"{value.name}, on the way to its softmax, has another reader")
        if is_op(node, "Softmax"):
            break
        if is_op(node, "Add"):
            other = constant_of(node.inputs[1] if node.inputs[0] is value else node.inputs[0])
            if other is None or shapes.of(node.outputs[0]) != shapes.of(value) or len(added) == _MOST_ADDITIONS:
                raise RefusalError(f"Add {node.name} adds something to its scores that is computed, or a third thing")
            added.append(_window_bias(other, shapes.of(value), scores.output, shapes))
        elif not is_op(node, *_RESHAPES):
            raise RefusalError(f"{node.op_type} {node.name} lies between its scores and their softmax")
        value = node.outputs[0]
    if node.attributes.get_int("axis", -1) != -1:
        raise RefusalError(f"{node.name} is not over the last axis")
    return tuple(added), node


def _window_bias(
    constant: NDArray[np.generic], shape: tuple[int, ...], scores: ir.Value, shapes: Batches
) -> NDArray[np.float32]:
    """What is added to scores [B, H, T, S] while they have `shape`, as [W, 1 or H, 1 or T, S] with W dividing B."""
    whole = np.broadcast_to(constant.astype(np.float32, copy=False), shape).reshape(shapes.of(scores))
    for windows in _divisors(shapes.one[str(scores.name)][0]):
        if np.array_equal(whole.reshape(-1, windows, *whole.shape[1:]), _repeated(whole[:windows], whole)):
            break
    else:
        raise RefusalError(f"what is added to {scores.name} differs from image to image")
    kept = whole[:windows]
    for axis in (1, 2):
        first = kept.take([0], axis)
        if np.array_equal(np.broadcast_to(first, kept.shape), kept):
            kept = first
    return np.ascontiguousarray(kept)


def _repeated(part: NDArray[np.float32], whole: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.broadcast_to(part, (len(whole) // len(part), *part.shape))


def _operand(letter: str, value: ir.Value, to_rows: tuple[int, ...], shapes: Batches) -> FoundQuantizer:
    """The quantizer of an operand whose heads lie side by side: [B, H, T, d] (`to_rows` of it) of [B·T, H·d]."""
    moved = trace(value, shapes.two)
    found = match_quantizer(moved.source)
    if found is None:
        raise RefusalError(f"{letter} is moved in a way that cannot be followed to its quantizer")
    index = moved.index.transpose(to_rows).reshape(-1) if moved.index.ndim == 4 else np.zeros(0)
    size = int(np.prod(shapes.of(moved.source)))
    if not np.array_equal(index, np.arange(size)):
        raise RefusalError(f"the heads of {letter} do not lie side by side in {moved.source.name}")
    if found.signed and found.quantizer.m:
        raise RefusalError(f"{letter} has a two-region quantizer in an int8 container")
    return found


def _joined_heads(context: ir.Value, shapes: Batches) -> tuple[FoundQuantizer | None, tuple[ir.Value, ...]]:
    """The quantizer that alone reads the context, if there is one, and where its heads have come side by side."""
    quantizers = quantizers_of(context)
    one = quantizers[0] if quantizers is not None and len(quantizers) == 1 else None
    output = None if one is None or one.signed else one
    read = readers(context if output is None else output.codes, shapes.two)
    batch, heads, tokens, size = shapes.of(context)
    straight = np.arange(batch * heads * tokens * size).reshape(batch, heads, tokens, size).transpose(0, 2, 1, 3)
    for reader in read:
        if reader.node is None or not np.array_equal(reader.trace.index.reshape(-1), straight.reshape(-1)):
            raise RefusalError(f"its heads are not side by side where {_named(reader)} reads them")
        shapes.target(reader.value)
    return output, tuple(dict.fromkeys(reader.value for reader in read))


@dataclass(frozen=True)
class NormPattern:
    """A norm read by quantizers alone, one `paths` entry each."""

    norm: Norm
    epsilon: float
    paths: tuple["QuantizedPath", ...]


@dataclass(frozen=True)
class QuantizedPath:
    """Movement from a norm to a quantizer, and from its codes to `target` by whole rows.

    `moves` lead to the quantizer, mostly none; `rows` as `LayerNormQuantize` takes it, [1] if no row moves; `target`
    is the quantizer's codes if what follows them is no such movement.
    """

    moves: tuple[ir.Node, ...]
    quantizer: FoundQuantizer
    rows: NDArray[np.int64]
    target: ir.Value


def match_norm(norm: Norm, shapes: Batches) -> NormPattern:
    """Read a norm and all that its output becomes.

    Raises:
        RefusalError: something reads its floats.
    """
    rank = len(shapes.of(norm.input))
    if norm.node.attributes.get_int("axis", -1) not in (-1, rank - 1):
        raise RefusalError("it is not over the last axis")
    if norm.output.is_graph_output() or any(out.uses() or out.is_graph_output() for out in norm.node.outputs[1:]):
        raise RefusalError("its floats, or its statistics, are read elsewhere")
    epsilon = norm.node.attributes.get_float("epsilon", _DEFAULT_EPSILON)
    if not epsilon > 0:
        raise RefusalError(f"its epsilon is {epsilon}")
    paths: dict[ir.Value, QuantizedPath] = {}
    for node in norm.output.consumers():
        moves, quantizer = _first_quantizer(node, norm.output)
        if quantizer.signed:
            raise RefusalError(f"{quantizer.codes.name} are int8 codes")
        rows, target = (np.zeros(1, np.int64), quantizer.codes) if moves else _moved_rows(quantizer.codes, shapes)
        paths[quantizer.codes] = QuantizedPath(moves, quantizer, rows, target)
    return NormPattern(norm, epsilon, tuple(paths.values()))


def _first_quantizer(node: ir.Node, source: ir.Value) -> tuple[tuple[ir.Node, ...], FoundQuantizer]:
    """Follow movement with one reader from `node`, which reads `source`, to the quantizer at its end."""
    moves: list[ir.Node] = []
    while is_op(node, *MOVEMENT_OPS) and node.inputs[0] is source and len(node.outputs) == 1:
        moves.append(node)
        source = node.outputs[0]
        after = quantizers_of(source)
        if after is not None and len(after) == 1:
            return tuple(moves), after[0]
        reader = only_consumer(source)
        if reader is None:
            raise RefusalError(f"{source.name}, moved from it, has more than one reader")
        node = reader
    quantizer = match_reader(node)
    if quantizer is None or moves:
        raise RefusalError(f"its floats are read by {node.op_type} {node.name}")
    return (), quantizer


def _moved_rows(codes: ir.Value, shapes: Batches) -> tuple[NDArray[np.int64], ir.Value]:
    """The movement of whole rows that leads to the one value which is read, and that value; else none, and `codes`."""
    read = readers(codes, shapes.two)
    targets = {reader.value for reader in read}
    if len(targets) != 1:
        return np.zeros(1, np.int64), codes
    target = targets.pop()
    try:
        shapes.target(target)
        return shapes.row_table(read[0].trace.index, codes), target
    except RefusalError:
        return np.zeros(1, np.int64), codes


@dataclass(frozen=True)
class PatchesPattern:
    """Images quantized and cut into disjoint patches, `target` [B, .., C·P·Q]."""

    site: str
    quantizer: FoundQuantizer
    patch: tuple[int, int]
    target: ir.Value


def match_patches(product: IntegerProduct, shapes: Batches) -> PatchesPattern | None:
    """The patches that a Linear reads, or None if it reads something else.

    Raises:
        RefusalError: their shape depends on the batch in more than one dimension.
    """
    moved = trace(product.left, shapes.two)
    quantizer = match_quantizer(moved.source)
    if quantizer is None or quantizer.signed or moved.source is product.left:
        return None
    shape = shapes.of(quantizer.x)
    if len(shape) != 4 or {reader.value for reader in readers(moved.source, shapes.two)} != {product.left}:
        return None
    _, channels, height, width = shape
    size = moved.index.shape[-1]
    positions = np.arange(moved.index.size).reshape(shape) if moved.index.size == np.prod(shape) else None
    for columns in _divisors(width):
        rows = size // (channels * columns)
        if positions is None or rows * channels * columns != size or height % max(rows, 1):
            continue
        if np.array_equal(patches(positions, rows, columns).reshape(-1), moved.index.reshape(-1)):
            shapes.target(product.left)
            return PatchesPattern(product.site, quantizer, (rows, columns), product.left)
    return None


@dataclass(frozen=True)
class LinearPattern:
    """A Linear and what follows it: GELU, then a quantizer or the Add of a residual stream.

    `residual` is the Add and the index of its other input; `rows` as `Linear` takes it, [1] if no row moves; `output`
    is what the operator gives.
    """

    product: IntegerProduct
    input_scale: float
    input_zero_point: int
    activation: str
    quantizer: FoundQuantizer | None
    residual: tuple[ir.Node, int] | None
    rows: NDArray[np.int64]
    output: ir.Value


def match_linear(product: IntegerProduct, shapes: Batches, claimed: set[ir.Node]) -> LinearPattern:
    """Read a Linear and what follows it; an Add in `claimed` is another Linear's residual, one found is put there.

    Raises:
        RefusalError: it is not what the operator computes.
    """
    scale = scalar_of(product.left_scale)
    zero_point = 0.0 if product.left_zero is None else scalar_of(product.left_zero)
    if scale is None or not LEAST_SCALE <= scale <= MOST_SCALE or product.left.dtype is not ir.DataType.UINT8:
        raise RefusalError(f"its input is not uint8 codes of one scale from {LEAST_SCALE:.0e} to {MOST_SCALE:.0e}")
    if zero_point is None:
        raise RefusalError("the zero point of its input is not one constant")
    if product.right_zero is not None and scalar_of(product.right_zero) != 0:
        raise RefusalError("its weight has a zero point")
    if shapes.of(product.left)[-1] > MOST_TERMS:
        raise RefusalError(f"it sums {shapes.of(product.left)[-1]} products; the operator sums {MOST_TERMS} at most")
    taken = (product, scale, int(zero_point))
    value, activation = product.output, "none"
    after = only_consumer(value)
    if after is not None and is_op(after, "Gelu") and after.attributes.get_string("approximate", "none") == "none":
        value, activation = after.outputs[0], "gelu"
    no_rows = np.zeros(1, np.int64)
    quantizers = quantizers_of(value)
    if quantizers is not None and len(quantizers) == 1 and not quantizers[0].signed:
        return LinearPattern(*taken, activation, quantizers[0], None, no_rows, quantizers[0].codes)
    found = _residual(value, shapes, claimed)
    if found is None:
        return LinearPattern(*taken, activation, None, None, no_rows, value)
    add, index, rows = found
    claimed.add(add)
    return LinearPattern(*taken, activation, None, (add, index), rows, add.outputs[0])


def _residual(value: ir.Value, shapes: Batches, claimed: set[ir.Node]) -> tuple[ir.Node, int, NDArray[np.int64]] | None:
    """The Add that alone reads `value`, its rows moved or not, the index of the other input, and the rows' table."""
    read = readers(value, shapes.two)
    if len(read) != 1 or read[0].node is None or not is_op(read[0].node, "Add") or read[0].node in claimed:
        return None
    add, moved = read[0].node, read[0].value
    index = 1 if add.inputs[0] is moved else 0
    other = add.inputs[index]
    if other is None or other is moved or str(other.name) not in shapes.two or shapes.of(other) != shapes.of(moved):
        return None
    try:
        table = shapes.row_table(read[0].trace.index, value)
    except RefusalError:
        return None
    return add, index, np.argsort(table)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _named(reader: Reader) -> str:
    return "the model's output" if reader.node is None else f"{reader.node.op_type} {reader.node.name}"
