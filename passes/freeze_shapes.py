"""Find the shapes of a model whose batch alone is open, and make constants of what does not depend on it.

Exporters compute the targets of Reshape and Expand, and the scale of attention, from Shape(x). With the image size
fixed, each dimension is a number c or a multiple k·B of the batch B. Constant folding at B = 2, 3 and 5 tells
which: three points that agree with c, or with k·B.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.constant_folding import BATCHES, fold_at_batch
from mptqc.graph.edit import Builder, add_initializer, constant_of, is_op, producer, remove_dead
from mptqc.graph.shapes import Dim
from mptqc.passes.base import Pass, PassResult

logger = logging.getLogger(__name__)

# Larger initializers hold weights, on which no shape depends: the folding sees them as inputs.
_SHAPE_BYTES = 1024


@dataclass(frozen=True)
class Folded:
    """A model at one batch size: the types and dimensions of its values, and which became constants, by name."""

    types: dict[str, ir.DataType]
    dims: dict[str, tuple[int, ...]]
    constants: dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class FreezeShapes(Pass):
    """Give values their shapes in terms of the batch, Reshapes constant targets, and fold what the batch leaves alone.

        t = Concat(Gather(Shape(x), 0), [16, 48])
        y = Reshape(x, t)                              →    y = Reshape(x, [-1, 16, 48])

    A model with a fixed batch needs none of it, and one with other open dimensions than the batch gets none. One run
    is a fixpoint.
    """

    name: ClassVar[str] = "freeze-shapes"

    def call(self, model: ir.Model) -> PassResult:
        """Fold at three batch sizes, then edit.

        Raises:
            ModelError: the model is not valid ONNX.
        """
        batch = _open_batch(model)
        if batch is None:
            return PassResult(model, 0)
        shown = _without_weights(model)
        folded = [_fold(shown, size) for size in BATCHES]
        shapes = _merge(str(batch), folded)
        for value in (output for node in model.graph for output in node.outputs):
            if value.name in shapes:
                value.shape = ir.Shape(shapes[value.name])
                value.dtype = folded[0].types[value.name]
        edits = _lift_fixed(model.graph, folded)
        edits += sum(_freeze_target(node, shapes) for node in list(model.graph) if is_op(node, "Reshape"))
        edits += sum(_shorten_target(model, node, shapes) for node in list(model.graph) if is_op(node, "Expand"))
        if edits:
            remove_dead(model)
        return PassResult(model, edits)


def _open_batch(model: ir.Model) -> ir.SymbolicDim | None:
    """The batch dimension if it is named and all others are numbers."""
    if len(model.graph.inputs) != 1 or model.graph.inputs[0].shape is None:
        return None
    first, *others = [*model.graph.inputs[0].shape, None]
    if not isinstance(first, ir.SymbolicDim) or first.value is None:
        return None
    return first if all(isinstance(dim, int) for dim in others[:-1]) else None


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """The model as a message, large initializers turned into inputs."""
    graph = model.graph
    weights = [value for value in graph.initializers.values() if value.const_value and _is_weight(value.const_value)]
    tensors = [value.const_value for value in weights]
    try:
        for value in weights:
            assert value.const_value is not None
            value.shape, value.dtype = ir.Shape(value.const_value.numpy().shape), value.const_value.dtype
            graph.initializers.pop(str(value.name))
            value.const_value = None
            graph.inputs.append(value)
        proto = ir.to_proto(model)
    finally:
        for value, tensor in zip(weights, tensors, strict=True):
            if value in graph.inputs:
                graph.inputs.remove(value)
            value.const_value = tensor
            graph.register_initializer(value)
    return proto


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    return tensor.nbytes > _SHAPE_BYTES


def _fold(shown: onnx.ModelProto, batch: int) -> Folded:
    proto = fold_at_batch(shown, batch)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    dims: dict[str, tuple[int, ...]] = {name: array.shape for name, array in constants.items()}
    types = {name: ir.DataType.from_numpy(array.dtype) for name, array in constants.items()}
    for value in [*proto.graph.value_info, *proto.graph.output]:
        found = ir.from_proto(value)
        if found.shape is not None and found.dtype is not None and found.shape.is_static():
            dims[value.name] = tuple(found.shape.numpy())
            types[value.name] = found.dtype
    return Folded(types, dims, constants)


def _merge(batch: str, folded: Sequence[Folded]) -> dict[str, tuple[Dim, ...]]:
    shapes: dict[str, tuple[Dim, ...]] = {}
    for name in folded[0].dims:
        if any(name not in each.dims for each in folded):
            continue
        found = [each.dims[name] for each in folded]
        if len({len(dims) for dims in found}) == 1:
            shapes[name] = tuple(_merge_dim(batch, sizes) for sizes in zip(*found, strict=True))
    return shapes


def _merge_dim(batch: str, sizes: Sequence[int]) -> Dim:
    if len(set(sizes)) == 1:
        return sizes[0]
    factors = {size / number for size, number in zip(sizes, BATCHES, strict=True)}
    factor = factors.pop()
    if factors or factor != int(factor):
        return None
    return batch if factor == 1 else f"{int(factor)}*{batch}"


def _lift_fixed(graph: ir.Graph, folded: Sequence[Folded]) -> int:
    """Make an initializer of every value that folds to the same constant at each batch size."""
    edits = 0
    for value in [output for node in graph if not is_op(node, "Constant") for output in node.outputs]:
        arrays = [each.constants.get(str(value.name)) for each in folded]
        first = arrays[0]
        if first is None or value.is_graph_output() or not value.uses():
            continue
        if all(other is not None and _equal(first, other) for other in arrays[1:]):
            name, value.name = str(value.name), None
            new = add_initializer(graph, name, first)
            ir.convenience.replace_all_uses_with(value, new)
            logger.debug("folded %s", name)
            edits += 1
    return edits


def _equal(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _freeze_target(node: ir.Node, shapes: dict[str, tuple[Dim, ...]]) -> bool:
    dims = shapes.get(str(node.outputs[0].name))
    if dims is None or constant_of(node.inputs[1]) is not None:
        return False
    open_axes = [dim for dim in dims if not isinstance(dim, int)]
    if len(open_axes) > 1 or 0 in dims:
        return False
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    target = np.array([dim if isinstance(dim, int) else -1 for dim in dims], np.int64)
    node.replace_input_with(1, add_initializer(graph, f"{node.name or node.outputs[0].name}/target", target))
    return True


def _shorten_target(model: ir.Model, node: ir.Node, shapes: dict[str, tuple[Dim, ...]]) -> bool:
    """Expand(x, target) to [B, c, …]: the target becomes Concat(Shape(input; 0, 1), [c, …])."""
    dims = shapes.get(str(node.outputs[0].name))
    image = model.graph.inputs[0]
    assert image.shape is not None
    batch = image.shape[0]
    known = constant_of(node.inputs[1]) is not None or producer(node.inputs[1], "Concat") is not None
    if known or not dims or dims[0] != str(batch) or not all(isinstance(dim, int) for dim in dims[1:]):
        return False
    build = Builder(node, node.name or str(node.outputs[0].name))
    count = build.op("Shape", [image], {"start": 0, "end": 1}, name="batch")
    rest = build.constant("rest", np.array(dims[1:], np.int64))
    node.replace_input_with(1, build.op("Concat", [count, rest], {"axis": 0}, name="target"))
    replaced = node.inputs[1]
    assert replaced is not None
    replaced.shape, replaced.dtype = ir.Shape([len(dims)]), ir.DataType.INT64
    return True
