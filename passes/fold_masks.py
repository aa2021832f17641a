"""Make constants of what is added alike for every image: masks and position biases that exporters expand to the batch.

    m = Where(Expand(true, [B, 1, T, T]), 0, -inf)
    y = Add(scores, Add(bias, m))                         →    y = Add(scores, bias)

    windows = Tile(mask [W, 1, T, T], [B, 1, 1, 1])
    y = Add(scores [B·W, H, T, T], windows)               →    y = Reshape(Add(Reshape(scores, [-1, W, …]), mask), …)

What depends on nothing but the number of images is worked out for 2, 3 and 5 of them, or for a fixed batch. If all
images have the same, that is added; nothing if it is 0. A sum of two such is added one after the other, so that neither
is multiplied out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.constant_folding import BATCHES, fold_at_batch
from mptqc.graph.edit import Builder, constant_of, is_op, producer, remove_dead, replace_value
from mptqc.graph.shapes import dims_of
from mptqc.passes.base import Pass, PassResult

_LEAST_RANK = 3
"""Of a constant that is taken for a mask: biases of Linears have one axis."""

Array: TypeAlias = NDArray[np.generic]


@dataclass(frozen=True)
class Addition:
    """`node` adds `terms` to its input `index`: each is what every image gets, [windows, …]."""

    node: ir.Node
    index: int
    terms: tuple[Array, ...]


@dataclass(frozen=True)
class FoldMasks(Pass):
    """Add constants in the place of what is computed from the batch size alone. One run is a fixpoint."""

    name: ClassVar[str] = "fold-masks"

    def call(self, model: ir.Model) -> PassResult:
        """Find every such Add, work out what it adds, then edit.

        Raises:
            ModelError: the model is not valid ONNX.
        """
        dependent = _dependent_on_images(model.graph)
        candidates = [
            (node, index, _summands(other))
            for node in model.graph
            if is_op(node, "Add")
            for index, other in ((0, node.inputs[1]), (1, node.inputs[0]))
            if node.inputs[index] in dependent and other is not None and other not in dependent
            if _adds_masks(node, other)
        ]
        known = _rows(model, [term for _, _, terms in candidates for term in terms])
        found = [
            Addition(node, index, tuple(known[term] for term in terms))
            for node, index, terms in candidates
            if all(term in known and _fits(known[term], node.inputs[index]) for term in terms)
        ]
        edits = sum(_rewrite(addition) for addition in found)
        if edits:
            remove_dead(model)
        return PassResult(model, edits)


def _dependent_on_images(graph: ir.Graph) -> set[ir.Value | None]:
    """The values that images decide, not their number alone."""
    dependent: set[ir.Value | None] = {value for value in graph.inputs if value.name not in graph.initializers}
    for node in graph:
        if not is_op(node, "Shape", "Size") and any(value in dependent for value in node.inputs):
            dependent.update(node.outputs)
    return dependent


def _adds_masks(node: ir.Node, other: ir.Value) -> bool:
    """True unless `other` is a constant that is no mask of zeros; sizes must be known, and the Add keep them."""
    constant = constant_of(other)
    if constant is not None and (constant.ndim < _LEAST_RANK or constant.any()):
        return False
    dims = [dims_of(value) for value in (*node.inputs, node.outputs[0]) if value is not other and value is not None]
    return not node.outputs[0].is_graph_output() and dims[0] is not None and dims[0] == dims[1]


def _summands(value: ir.Value) -> list[ir.Value]:
    add = producer(value, "Add")
    if add is None:
        return [value]
    return [term for one in add.inputs if one is not None for term in _summands(one)]


def _rows(model: ir.Model, terms: Sequence[ir.Value]) -> dict[ir.Value, Array]:
    """What every image gets of each value, [windows, …]; those that differ from image to image are left out."""
    rows = {term: array for term in terms if (array := constant_of(term)) is not None}
    computed = {str(term.name): term for term in terms if term not in rows and dims_of(term) is not None}
    if computed:
        dims = dims_of(model.graph.inputs[0])
        batches = (dims[0],) if dims and isinstance(dims[0], int) else BATCHES
        part = _part_of(model, list(computed))
        at = [_values_at(part, batch) for batch in batches]
        for name, term in computed.items():
            row = _row_of_all([each.get(name) for each in at], batches)
            if row is not None:
                rows[term] = row
    return rows


def _part_of(model: ir.Model, names: Sequence[str]) -> onnx.ModelProto:
    """What of the model makes the named values, as its outputs."""
    part = ir.from_proto(ir.to_proto(model))
    made = {str(value.name): value for node in part.graph for value in node.outputs}
    part.graph.outputs[:] = [made[name] for name in names]
    remove_dead(part)
    return ir.to_proto(part)


def _values_at(part: onnx.ModelProto, batch: int) -> Mapping[str, Array]:
    """The outputs that no image decides, at one number of images."""
    folded = ir.from_proto(fold_at_batch(part, batch))
    values = {str(value.name): constant_of(value) for value in folded.graph.outputs}
    return {name: array for name, array in values.items() if array is not None}


def _row_of_all(arrays: Sequence[Array | None], batches: Sequence[int]) -> Array | None:
    """The part of [B·windows, …] that every image has, [windows, …]; what does not grow with the batch is that part."""
    first, last = arrays[0], arrays[-1]
    if first is None or last is None or first.ndim < _LEAST_RANK:
        return None
    grows = len(first) != len(last) or (len(batches) == 1 and len(first) % batches[0] == 0)
    windows = len(first) // batches[0] if grows else len(first)
    for array, batch in zip(arrays, batches, strict=True):
        shape = (batch if grows else 1, windows, *first.shape[1:])
        if array is None or array.size != np.prod(shape) or not (array.reshape(shape) == first[:windows]).all():
            return None
    return first[:windows]


def _fits(row: Array, value: ir.Value | None) -> bool:
    """True if `row` [windows, …] is added to `value` [B·windows, c, …] or [B, c, …] without making it larger."""
    dims = dims_of(value)
    if dims is None or len(dims) != row.ndim or not all(isinstance(dim, int) for dim in dims[1:]):
        return False
    windows, images = len(row), dims[0]
    if windows > 1 and not (
        images % windows == 0 if isinstance(images, int) else f"{images}".startswith(f"{windows}*")
    ):
        return False
    return all(size in (1, dim) for size, dim in zip(row.shape[1:], dims[1:], strict=True))


def _rewrite(addition: Addition) -> int:
    node, value = addition.node, addition.node.inputs[addition.index]
    assert value is not None
    build = Builder(node, str(node.name or node.outputs[0].name))
    dims = dims_of(value)
    assert dims is not None
    for term in addition.terms:
        if not term.any():
            continue
        if len(term) == 1:
            value = build.op("Add", [value, build.constant("every_image", term)])
            continue
        parted = build.constant("windows", np.array([-1, len(term), *dims[1:]], np.int64))
        joined = build.constant("joined", np.array([-1, *dims[1:]], np.int64))
        by_image = build.op("Reshape", [value, parted])
        value = build.op("Reshape", [build.op("Add", [by_image, build.constant("every_image", term[None])]), joined])
    value.shape, value.type = addition.node.outputs[0].shape, addition.node.outputs[0].type
    replace_value(addition.node.outputs[0], value)
    return 1
