"""What each operator of `ai.mptqc` replaces in a quantized model; finding never edits.

A candidate that the operator cannot express raises `RefusalError`, which says what was found where: it keeps its
portable form. Movement is never matched op by op: indices are pushed through it (`mptqc.graph.layout`). Attentions are
in `native_attention`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import RefusalError
from mptqc.graph.batch_shapes import Batches, divisors
from mptqc.graph.edit import constant_of, is_op, only_consumer, producer, scalar_of
from mptqc.graph.integer_products import IntegerProduct
from mptqc.graph.layout import MOVEMENT_OPS, readers, trace
from mptqc.graph.match import Norm
from mptqc.graph.quantizer_match import (
    LEAST_SCALE,
    MOST_SCALE,
    FoundQuantizer,
    match_quantizer,
    match_reader,
    quantizers_of,
)
from mptqc.graph.rotary import RotatedHeads, match_rotated
from mptqc.reference.custom_ops import MOST_TERMS, PANEL, QUICK_GELU_FACTOR, ROTATED_WIDTHS, patches

_DEFAULT_EPSILON = 1e-5  # of LayerNormalization


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

    Patches of one row are no patches: heads are joined so too, which ONNX Runtime's Transpose does faster.

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
    for columns in divisors(width):
        rows = size // (channels * columns)
        if positions is None or rows * channels * columns != size or rows < 2 or height % rows:
            continue
        if np.array_equal(patches(positions, rows, columns).reshape(-1), moved.index.reshape(-1)):
            shapes.target(product.left)
            return PatchesPattern(product.site, quantizer, (rows, columns), product.left)
    return None


@dataclass(frozen=True)
class LinearPattern:
    """A Linear and what follows it: GELU, then a quantizer (behind `multiplier` [N]) or the Add of a residual stream.

    `residual` is the Add and the index of its other input; `rows` as `Linear` takes it, [1] if no row moves; `output`
    is what the operator gives. `rotated`: the quantizer reads its heads rotated, and there is none of the rest.
    """

    product: IntegerProduct
    input_scale: float
    input_zero_point: int
    activation: str
    multiplier: ir.Value | None
    quantizer: FoundQuantizer | None
    residual: tuple[ir.Node, int] | None
    rows: NDArray[np.int64]
    output: ir.Value
    rotated: RotatedHeads | None = None


def match_linear(
    product: IntegerProduct, shapes: Batches, claimed: set[ir.Node], *, rotates: bool = True
) -> LinearPattern:
    """Read a Linear and what follows it; an Add in `claimed` is another Linear's residual, one found is put there.

    Rotations of heads are read only if the library `rotates`.

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
    found_activation = _activation(value)
    if found_activation is not None:
        value, activation = found_activation
    no_rows = np.zeros(1, np.int64)
    rotated = rotated_heads(product.output)
    if rotated is not None and rotates and why_not_rotated(rotated, shapes) is None:
        quantizer, codes = _quantized_rotation(rotated, shapes)
        return LinearPattern(*taken, activation, None, quantizer, None, no_rows, codes, rotated)
    for x, multiplier in ((value, None), *_scaled(value)):
        quantizers = quantizers_of(x)
        if quantizers is not None and len(quantizers) == 1 and not quantizers[0].signed:
            return LinearPattern(*taken, activation, multiplier, quantizers[0], None, no_rows, quantizers[0].codes)
    found = _residual(value, shapes, claimed)
    if found is None:
        return LinearPattern(*taken, activation, None, None, None, no_rows, value)
    add, index, rows = found
    claimed.add(add)
    return LinearPattern(*taken, activation, None, None, (add, index), rows, add.outputs[0])


def _activation(value: ir.Value) -> tuple[ir.Value, str] | None:
    """What an activation makes of `value`, and its name in `ACTIVATIONS`, if nothing else reads `value`."""
    after = only_consumer(value)
    if after is not None and is_op(after, "Gelu"):
        return after.outputs[0], "gelu_tanh" if after.attributes.get_string("approximate", "none") == "tanh" else "gelu"
    for product in value.consumers():
        sigmoid = next((made for one in product.inputs if (made := producer(one, "Sigmoid")) is not None), None)
        slope = None if sigmoid is None else producer(sigmoid.inputs[0], "Mul")
        if not is_op(product, "Mul") or sigmoid is None or slope is None or value not in slope.inputs:
            continue
        factors = [scalar_of(one) for one in slope.inputs if one is not value]
        close = [one is not None and abs(one - QUICK_GELU_FACTOR) < 2**-20 for one in factors]
        alone = only_consumer(slope.outputs[0]) is sigmoid and only_consumer(sigmoid.outputs[0]) is product
        if close == [True] and alone and set(value.consumers()) == {slope, product} and not value.is_graph_output():
            return product.outputs[0], "quick_gelu"
    return None


def rotated_heads(value: ir.Value) -> RotatedHeads | None:
    """The rotation in mptqc's form that alone reads `value`, parted into heads."""
    reshape = only_consumer(value)
    if not is_op(reshape, "Reshape") or reshape is None:
        return None
    sums = [node.outputs[0] for term in reshape.outputs[0].consumers() for node in term.outputs[0].consumers()]
    found = [rotated for total in sums if (rotated := match_rotated(total)) is not None]
    return found[0] if found and found[0].x is reshape.outputs[0] else None


def why_not_rotated(rotated: RotatedHeads, shapes: Batches) -> str | None:
    """Why `LinearQuantize` cannot rotate these heads; None if it can."""
    quantizers = quantizers_of(rotated.output)
    if quantizers is None or len(quantizers) != 1 or quantizers[0].signed:
        return f"{rotated.output.name} is not read by one quantizer of uint8 codes alone"
    tokens, heads, width = shapes.of(rotated.x)[1:]
    if width not in ROTATED_WIDTHS:
        return f"its heads are {width} wide, not one of {', '.join(map(str, ROTATED_WIDTHS))}"
    shape, *others = {table.shape for table in map(constant_of, (rotated.cosine, rotated.sine)) if table is not None}
    if others or shape[0] not in (1, tokens) or shape[1] not in (1, heads) or shape[2] != width:
        return f"its cosines and sines have shapes {shape} {others}, not [{tokens}, 1 or {heads}, {width}] both"
    if shape[1] != 1 and heads * width % PANEL:
        return f"each of its {heads} heads is rotated in its own way, and they fill no multiple of {PANEL} columns"
    return None


def _quantized_rotation(rotated: RotatedHeads, shapes: Batches) -> tuple[FoundQuantizer, ir.Value]:
    """The quantizer of the rotated heads, and its codes; where they are only read side by side, those."""
    quantizers = quantizers_of(rotated.output)
    assert quantizers, "`why_not_rotated` has seen it"
    codes = quantizers[0].codes
    _, tokens, heads, width = shapes.of(rotated.x)
    reader = only_consumer(codes)
    target = constant_of(reader.inputs[1]) if is_op(reader, "Reshape") and reader is not None else None
    if reader is None or target is None or target.tolist()[1:] != [tokens, heads * width]:
        return quantizers[0], codes
    return quantizers[0], reader.outputs[0]


def _scaled(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
    """`value` times one constant for each channel, and that constant [N], if nothing else reads `value`."""
    node = only_consumer(value)
    if node is None or not is_op(node, "Mul"):
        return
    multiplier = node.inputs[1 if node.inputs[0] is value else 0]
    array = constant_of(multiplier)
    if multiplier is not None and array is not None and array.ndim == 1 and array.dtype == np.float32:
        yield node.outputs[0], multiplier


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
