"""Let Linears work on their input's own rows where an exporter flattened the rows around them.

    Reshape(x → [M, K]) → Linear → Gelu → Linear → Reshape([M, N] → [.., N])        x [.., K], M = the rows' number

Everything between the two Reshapes works on each row by itself, so the rows may stay as they are.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder, constant_of, is_op, only_consumer, producer, remove_dead, replace_value
from mptqc.graph.shapes import Dim, dims_of, equal_when_sizes_match, last_dim, rank_of
from mptqc.passes.base import Pass, PassResult

logger = logging.getLogger(__name__)

_UNARY = ("Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "HardSwish", "LeakyRelu", "Elu", "Softplus")
_BINARY = ("Add", "Mul", "Sub", "Div")


@dataclass(frozen=True)
class FlattenedRows:
    """What lies between two Reshapes: `inner` flattens the rows, `chain` works on [M, ..], `outer` parts them again."""

    inner: ir.Node
    chain: tuple[ir.Node, ...]
    outer: ir.Node


@dataclass(frozen=True)
class UnflattenLinear(Pass):
    """Take away the Reshapes around a row of Linears and element-wise ops. One run is a fixpoint.

        r = Reshape(x, [-1, K])
        p = MatMul(r, W)             p = MatMul(x, W)
        q = Add(p, b)           →    y = Add(p, b)
        y = Reshape(q, [-1, T, N])

    If x's rows are not the ones that come out, x is reshaped to them first: one Reshape instead of two. What cannot
    be proved, or is read in between, stays.
    """

    name: ClassVar[str] = "unflatten-linear"

    def call(self, model: ir.Model) -> PassResult:
        """Find and rewrite from the inputs to the outputs: a rewritten region can end where the next one begins."""
        edits = 0
        for node in list(model.graph):
            found = match_flattened_rows(node)
            if found is not None and _rewrite(found):
                edits += 1
        if edits:
            remove_dead(model)
        return PassResult(model, edits)


def match_flattened_rows(first: ir.Node) -> FlattenedRows | None:
    """Return the flattened region whose first node is `first`, or None; pure."""
    inner = producer(_row_input(first), "Reshape")
    if inner is None or rank_of(inner.outputs[0]) != 2:
        return None
    chain: list[ir.Node] = []
    node: ir.Node | None = first
    value = inner.outputs[0]
    while node is not None and _works_by_rows(node, value):
        chain.append(node)
        value = node.outputs[0]
        node = only_consumer(value)
    if node is None or not is_op(node, "Reshape") or not any(is_op(each, "MatMul") for each in chain):
        return None
    return FlattenedRows(inner, tuple(chain), node) if node.inputs[0] is value else None


def _row_input(node: ir.Node) -> ir.Value | None:
    """The operand of `node` that is not constant."""
    return next((value for value in node.inputs if value is not None and constant_of(value) is None), None)


def _works_by_rows(node: ir.Node, value: ir.Value) -> bool:
    if is_op(node, *_UNARY):
        return True
    if is_op(node, "LayerNormalization"):
        return node.inputs[0] is value and node.attributes.get_int("axis", -1) in (-1, 1) and len(node.outputs) == 1
    if not is_op(node, "MatMul", *_BINARY) or len(node.inputs) != 2:
        return False
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    array = constant_of(other)
    if array is None:
        return False
    return (array.ndim == 2 and node.inputs[0] is value) if is_op(node, "MatMul") else array.ndim <= 1


def _rewrite(found: FlattenedRows) -> bool:
    first, last = found.chain[0], found.chain[-1]
    x, joined = found.inner.inputs[0], found.inner.outputs[0]
    K, N = last_dim(joined), last_dim(last.outputs[0])
    parted = _target_dims(found.outer)
    if x is None or K is None or N is None or parted is None or parted[-1] != N:
        return False
    source = x if _has_rows(x, K, parted[:-1]) else _reshaped(found, x, K, N)
    if source is None:
        return False
    for index, value in enumerate(first.inputs):
        if value is joined:
            first.replace_input_with(index, source)
    for node in found.chain:
        output = node.outputs[0]
        output.shape = ir.Shape([*parted[:-1], last_dim(output)])
    replace_value(found.outer.outputs[0], last.outputs[0])
    logger.debug("unflattened %s", first.name)
    return True


def _has_rows(x: ir.Value, K: int, rows: Sequence[Dim]) -> bool:
    """True if x is surely [*rows, K]: both have the same number of rows, so one row axis may stay unproved."""
    dims = dims_of(x)
    return dims is not None and len(dims) > 0 and dims[-1] == K and equal_when_sizes_match(dims[:-1], tuple(rows))


def _reshaped(found: FlattenedRows, x: ir.Value, K: int, N: int) -> ir.Value | None:
    """x as [*rows, K], by the outer Reshape's own constant target."""
    target = constant_of(found.outer.inputs[1])
    if target is None or (target == 0).any() or target[-1] != N:
        return None
    build = Builder(found.chain[0], found.inner.name or str(found.inner.outputs[0].name))
    rows = build.constant("rows", np.array([*target[:-1], K], np.int64))
    value = build.op("Reshape", [x, rows], name="Reshape_rows")
    value.dtype = ir.DataType.FLOAT
    parted = _target_dims(found.outer)
    assert parted is not None
    value.shape = ir.Shape([*parted[:-1], K])
    return value


def _target_dims(reshape: ir.Node) -> tuple[Dim, ...] | None:
    inferred = dims_of(reshape.outputs[0])
    target = constant_of(reshape.inputs[1])
    if target is None or (target == 0).any():
        return inferred
    stated: tuple[Dim, ...] = tuple(int(size) if size > 0 else None for size in target)
    if inferred is None or len(inferred) != len(stated):
        return stated
    return tuple(left if left is not None else right for left, right in zip(stated, inferred, strict=True))
