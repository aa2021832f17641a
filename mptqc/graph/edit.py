"""The only ways that passes change a graph."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

AttributeValue: TypeAlias = int | float | str | Sequence[int] | Sequence[float] | Sequence[str]


def constant_of(value: ir.Value | None) -> NDArray[np.generic] | None:
    """Return the array of an initializer or of a Constant node's output, else None."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar_of(value: ir.Value | None) -> float | None:
    """Return the number held by a constant of one element, else None."""
    array = constant_of(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """True if `node` is one of the named ops of the ONNX domain."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that makes `value` if it is one of the named ONNX ops, else None."""
    node = None if value is None else value.producer()
    return node if is_op(node, *op_types) else None


def only_consumer(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads `value`, or None if there are more, fewer, or it is a graph output."""
    consumers = value.consumers()
    return consumers[0] if len(consumers) == 1 and len(value.uses()) == 1 and not value.is_graph_output() else None


def add_initializer(
    graph: ir.Graph, name: str, array: NDArray[np.generic], dtype: ir.DataType | None = None
) -> ir.Value:
    """Register `array` as an initializer called `name`, or `name_1`, `name_2`, … if the name is taken."""
    unique, suffix = name, 0
    taken = graph.initializers
    while unique in taken:
        suffix += 1
        unique = f"{name}_{suffix}"
    tensor = ir.tensor(np.asarray(array, order="C"), dtype=dtype, name=unique)
    value = ir.val(unique, dtype=tensor.dtype, shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def set_initializer(node: ir.Node, index: int, array: NDArray[np.generic]) -> ir.Value:
    """Give input `index` of `node` a new constant; the old one stays for its other readers (copy-on-write)."""
    graph, old = node.graph, node.inputs[index]
    assert isinstance(graph, ir.Graph)
    assert old is not None
    made_by_a_node = old.producer() is not None
    value = add_initializer(graph, f"{old.name}/edited" if made_by_a_node else str(old.name), array)
    node.replace_input_with(index, value)
    return value


class Builder:
    """Appends new nodes just before an anchor node, in order; names that the graph has already get a number."""

    def __init__(self, anchor: ir.Node, prefix: str) -> None:
        graph = anchor.graph
        assert isinstance(graph, ir.Graph)
        self.graph = graph
        self._anchor = anchor
        self._prefix = prefix
        self._taken = {node.name for node in graph} | {value.name for node in graph for value in node.outputs}

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        domain: str = "",
        name: str = "",
        num_outputs: int = 1,
    ) -> ir.Value:
        """Insert one node and return its first output; `name` is appended to the builder's prefix."""
        return self.node(op_type, inputs, attributes, domain=domain, name=name, num_outputs=num_outputs).outputs[0]

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        domain: str = "",
        name: str = "",
        num_outputs: int = 1,
    ) -> ir.Node:
        """Insert one node and return it."""
        label = self._unique(f"{self._prefix}/{name or op_type}")
        outputs = [ir.val(self._unique(f"{label}_output{i or ''}")) for i in range(num_outputs)]
        typed = {  # an empty tuple says no type by itself
            key: ir.AttrInt64s(key, value) if value == () else value for key, value in (attributes or {}).items()
        }
        node = ir.node(op_type, inputs, typed, domain=domain, outputs=outputs, name=label)
        self.graph.insert_before(self._anchor, node)
        return node

    def constant(self, name: str, array: NDArray[np.generic], dtype: ir.DataType | None = None) -> ir.Value:
        """Register an initializer under the builder's prefix."""
        return add_initializer(self.graph, f"{self._prefix}/{name}", array, dtype)

    def _unique(self, name: str) -> str:
        unique, suffix = name, 0
        while unique in self._taken:
            suffix += 1
            unique = f"{name}_{suffix}"
        self._taken.add(unique)
        return unique


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Make every reader of `old`, graph outputs included, read `new`; a graph output keeps its name.

    If `old` is a graph output, `new` must be made by a node and be none itself: a value has one name.
    """
    if old.is_graph_output():
        assert new.producer() is not None, f"{new.name} is no node's output, so it cannot be the output {old.name}"
        assert not new.is_graph_output(), f"{new.name} is a graph output already, it cannot also be {old.name}"
        old.name, new.name = f"{old.name}_replaced", old.name
    new.shape = new.shape if new.shape is not None else old.shape
    new.type = new.type if new.type is not None else old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def insert_cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Insert a Cast right behind what makes `value`, or first of all, and return its output; no reader is changed."""
    maker = value.producer()
    graph = value.graph if maker is None else maker.graph
    assert isinstance(graph, ir.Graph)
    first = graph[0]
    cast = Builder(first, str(value.name)).node("Cast", [value], {"to": int(dtype)}, name=dtype.name.lower())
    if maker is not None:
        graph.insert_after(maker, cast)
    cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, dtype
    return cast.outputs[0]


def replace_output(old: ir.Value, new: ir.Value) -> None:
    """Make `new` the graph output that `old` is, under its name; other readers of `old` stay."""
    graph = old.graph
    assert isinstance(graph, ir.Graph)
    old.name, new.name = f"{old.name}_replaced", old.name
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = new


def remove_dead(model: ir.Model) -> None:
    """Remove nodes and initializers that no output depends on."""
    RemoveUnusedNodesPass()(model)
