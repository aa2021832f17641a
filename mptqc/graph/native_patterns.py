"""What each operator of `ai.mptqc` replaces in a quantized model; finding never edits.

A candidate that the operator cannot express raises `RefusalError`, which says what was found where: it keeps its
portable form. Movement is never matched op by op: indices are pushed through it (`mptqc.graph.layout`). Linears are in
`native_linear`, attentions in `native_attention`.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import RefusalError
from mptqc.graph.batch_shapes import Batches, divisors
from mptqc.graph.edit import is_op, only_consumer
from mptqc.graph.integer_products import IntegerProduct
from mptqc.graph.layout import MOVEMENT_OPS, readers, trace
from mptqc.graph.match import Norm
from mptqc.graph.quantizer_match import FoundQuantizer, match_quantizer, match_reader, quantizers_of
from mptqc.reference.custom_ops import patches

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
