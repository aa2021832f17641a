"""What the norms of `ai.mptqc` replace in a quantized model; finding never edits.

    LayerNormalization -> quantizer (-> movement)                                            LayerNormQuantize
    (movement ->) LayerNormalization -> (movement ->) Add(residual) = y                      LayerNormAdd
    y, or the norm itself, read as floats and by a quantizer, moved or not (-> movement)     LayerNormAddQuantize

The last two are SwinV2's order, norms behind their Linears. All movement is of whole rows.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import RefusalError
from mptqc.graph.batch_shapes import Batches
from mptqc.graph.edit import is_op, only_consumer
from mptqc.graph.layout import MOVEMENT_OPS, readers, trace
from mptqc.graph.match import Norm
from mptqc.graph.native_linear import residual_add
from mptqc.graph.quantizer_match import FoundQuantizer, match_reader, quantizers_of

_DEFAULT_EPSILON = 1e-5  # of LayerNormalization


@dataclass(frozen=True)
class NormPattern:
    """A norm read by quantizers alone, one `paths` entry each."""

    norm: Norm
    epsilon: float
    paths: tuple["QuantizedPath", ...]


@dataclass(frozen=True)
class QuantizedPath:
    """Movement from a norm, or from its sum, to a quantizer, and from its codes to `target` by whole rows.

    `moves` lead from a norm to the quantizer, mostly none; `rows` as the operator takes it, [1] if no row moves;
    `target` is the quantizer's codes if what follows them is no such movement.
    """

    moves: tuple[ir.Node, ...]
    quantizer: FoundQuantizer
    rows: NDArray[np.int64]
    target: ir.Value


@dataclass(frozen=True)
class NormSumPattern:
    """A norm whose floats go on.

    Attributes:
        norm: the norm.
        epsilon: its ε.
        x: what the operator reads: the norm's input, or the value whose rows were moved to it.
        rows: as the operator takes it, [1] if no row moves.
        residual: what is added; None: nothing.
        sum: the Add's output, or the norm's own.
        codes: the quantizer of the sum; None: there is none. Others than the first stay portable.
    """

    norm: Norm
    epsilon: float
    x: ir.Value
    rows: NDArray[np.int64]
    residual: ir.Value | None
    sum: ir.Value
    codes: QuantizedPath | None


def match_norm(norm: Norm, shapes: Batches) -> NormPattern:
    """Read a norm and all that its output becomes.

    Raises:
        RefusalError: something reads its floats.
    """
    epsilon = _epsilon(norm, shapes)
    if norm.output.is_graph_output():
        raise RefusalError("its floats are read elsewhere")
    paths: dict[ir.Value, QuantizedPath] = {}
    for node in norm.output.consumers():
        moves, quantizer = _first_quantizer(node, norm.output)
        if quantizer.signed:
            raise RefusalError(f"{quantizer.codes.name} are int8 codes")
        rows, target = np.zeros(1, np.int64), quantizer.codes
        if not moves:
            rows, target = _moved_rows(trace(norm.output, shapes.two).index, norm.output, quantizer.codes, shapes)
        paths[quantizer.codes] = QuantizedPath(moves, quantizer, rows, target)
    return NormPattern(norm, epsilon, tuple(paths.values()))


def match_norm_sum(norm: Norm, shapes: Batches) -> NormSumPattern | None:
    """Read a norm that is added to a residual, or that is read by a quantizer and as floats; None if it is neither.

    Raises:
        RefusalError: it is no norm that an operator computes.
    """
    epsilon = _epsilon(norm, shapes)
    found = residual_add(norm.output, shapes)
    if found is not None:
        add, index, moved = found
        try:
            x, rows = _source_rows(norm, moved.trace.index, shapes)
        except RefusalError:
            return None
        total = add.outputs[0]
        return NormSumPattern(norm, epsilon, x, rows, add.inputs[index], total, _codes(total, shapes))
    floats = [each for each in readers(norm.output, shapes.two) if not is_op(each.node, "QuantizeLinear")]
    codes = _codes(norm.output, shapes)
    if not floats or codes is None:
        return None
    x, rows = _source_rows(norm, trace(norm.output, shapes.two).index, shapes)
    return NormSumPattern(norm, epsilon, x, rows, None, norm.output, codes)


def _epsilon(norm: Norm, shapes: Batches) -> float:
    """The norm's ε.

    Raises:
        RefusalError: it is no norm that an operator computes.
    """
    if norm.node.attributes.get_int("axis", -1) not in (-1, len(shapes.of(norm.input)) - 1):
        raise RefusalError("it is not over the last axis")
    if any(out.uses() or out.is_graph_output() for out in norm.node.outputs[1:]):
        raise RefusalError("its statistics are read elsewhere")
    epsilon = norm.node.attributes.get_float("epsilon", _DEFAULT_EPSILON)
    if not epsilon > 0:
        raise RefusalError(f"its epsilon is {epsilon}")
    return epsilon


def _source_rows(norm: Norm, moved: NDArray[np.int64], shapes: Batches) -> tuple[ir.Value, NDArray[np.int64]]:
    """The value whose rows are moved to the norm and on to `moved`, positions in its output; and their table.

    Raises:
        RefusalError: not even from the norm on are whole rows moved.
    """
    above = trace(norm.input, shapes.two)
    try:
        return above.source, shapes.row_table(above.index.reshape(-1)[moved], above.source)
    except RefusalError:
        return norm.input, shapes.row_table(moved, norm.input)


def _codes(total: ir.Value, shapes: Batches) -> QuantizedPath | None:
    """The first quantizer of uint8 codes that reads `total`, moved by whole rows or not."""
    for reader in readers(total, shapes.two):
        quantizer = None if reader.node is None else match_reader(reader.node)
        if quantizer is None or quantizer.signed:
            continue
        try:
            rows, target = _moved_rows(reader.trace.index, total, quantizer.codes, shapes)
            shapes.target(target)
        except RefusalError:
            continue
        return QuantizedPath((), quantizer, rows, target)
    return None


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


def _moved_rows(
    index: NDArray[np.int64], source: ir.Value, codes: ir.Value, shapes: Batches
) -> tuple[NDArray[np.int64], ir.Value]:
    """The movement of whole rows from `source`, by `index`, to `codes` and on to what is read of them, and that value.

    It is the codes themselves if what follows them is no such movement.

    Raises:
        RefusalError: what leads to them is none either.
    """
    read = readers(codes, shapes.two)
    targets = {reader.value for reader in read}
    if len(targets) == 1:
        target = targets.pop()
        try:
            shapes.target(target)
            return shapes.row_table(index.reshape(-1)[read[0].trace.index], source), target
        except RefusalError:
            pass
    return shapes.row_table(index, source), codes
