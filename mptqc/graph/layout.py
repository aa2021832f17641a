"""Which source element does each element of a value come from?

Between a Linear and the product that reads it, exporters put any mixture of Reshape, Transpose, Split, Slice, Gather,
Squeeze and, for shifted windows, Slice + Concat. Instead of matching mixtures we push indices through them: a trace
holds, for every element of a value, its flat index in the nearest value that was really computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import constant_of, is_op

Number = TypeVar("Number", bound=np.generic)
Shapes = Mapping[str, tuple[int, ...]]
"""Concrete shape of each value, by value name, at one batch size (see `analysis.shapes`)."""

MOVEMENT_OPS = ("Reshape", "Transpose", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclass(frozen=True)
class Trace:
    """`index[i...]` is the flat position in `source` of element i... of the traced value; int64, the value's shape."""

    source: ir.Value
    index: NDArray[np.int64]

    def channels(self, shapes: Shapes) -> NDArray[np.int64]:
        """The source's last-axis position of every element; the traced value's shape."""
        return self.index % shapes[_name(self.source)][-1]


@dataclass(frozen=True)
class Reader:
    """A node that computes with (part of) a value, at the far end of any data movement."""

    node: ir.Node | None  # None: the graph output
    value: ir.Value
    trace: Trace


def trace(value: ir.Value, shapes: Shapes) -> Trace:
    """Follow data movement from `value` back to the value that was computed (possibly `value` itself)."""
    moved = _trace_movement(value, shapes)
    if moved is not None:
        return moved
    shape = shapes[_name(value)]
    return Trace(value, np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape))


def readers(source: ir.Value, shapes: Shapes) -> list[Reader]:
    """Every node that computes with `source` or with data moved from it, in graph order of discovery."""
    found: list[Reader] = []
    frontier, seen = [source], {source}
    while frontier:
        value = frontier.pop(0)
        if value.is_graph_output():
            found.append(Reader(None, value, trace(value, shapes)))
        for node in dict.fromkeys(value.consumers()):
            outputs = [out for out in node.outputs if _is_moved_from(out, source, shapes)]
            if not outputs:
                if is_op(node, "Shape"):
                    continue
                found.append(Reader(node, value, trace(value, shapes)))
            for out in outputs:
                if out not in seen:
                    seen.add(out)
                    frontier.append(out)
    return found


def _is_moved_from(value: ir.Value, source: ir.Value, shapes: Shapes) -> bool:
    moved = _trace_movement(value, shapes)
    return moved is not None and moved.source is source


def _trace_movement(value: ir.Value, shapes: Shapes) -> Trace | None:
    """One step and all before it; None if `value` is computed, or its movement cannot be resolved."""
    node = value.producer()
    if node is None or _name(value) not in shapes:
        return None
    if is_op(node, "Concat"):
        return _trace_concat(node, shapes)
    if not is_op(node, *MOVEMENT_OPS):
        return None
    data = node.inputs[0]
    if data is None or constant_of(data) is not None or _name(data) not in shapes:
        return None
    below = trace(data, shapes)
    index = move(node, value, below.index, shapes)
    return None if index is None else Trace(below.source, index)


def _trace_concat(node: ir.Node, shapes: Shapes) -> Trace | None:
    """A Concat is movement only if all its parts come from one value (a roll, or re-joined windows)."""
    if any(value is None or constant_of(value) is not None or _name(value) not in shapes for value in node.inputs):
        return None
    parts = [trace(value, shapes) for value in node.inputs if value is not None]
    if any(part.source is not parts[0].source for part in parts):
        return None
    return Trace(parts[0].source, np.concatenate([part.index for part in parts], axis=_attribute(node, "axis", 0)))


def move(node: ir.Node, value: ir.Value, index: NDArray[Number], shapes: Shapes) -> NDArray[Number] | None:
    """Make `value` by one movement op of an array of its input's shape; None if its parameters are not constant."""
    match node.op_type:
        case "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity":
            return index.reshape(shapes[_name(value)])
        case "Transpose":
            permutation = node.attributes.get("perm")
            return np.transpose(index, None if permutation is None else tuple(permutation.as_ints()))
        case "Split":
            axis = _attribute(node, "axis", 0)
            before = node.outputs[: node.outputs.index(value)]
            if any(_name(out) not in shapes for out in before):
                return None
            start = sum(shapes[_name(out)][axis] for out in before)
            return np.take(index, range(start, start + shapes[_name(value)][axis]), axis=axis)
        case "Gather":
            chosen = constant_of(node.inputs[1])
            return None if chosen is None else np.take(index, chosen.astype(np.int64), axis=_attribute(node, "axis", 0))
        case "Slice":
            return _slice(node, index)
        case _:
            return None


def _slice(node: ir.Node, index: NDArray[Number]) -> NDArray[Number] | None:
    bounds = [constant_of(value) for value in node.inputs[1:]]
    if any(bound is None for bound in bounds):
        return None
    starts, ends, *rest = [np.asarray(bound).reshape(-1).tolist() for bound in bounds]
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    cut = [slice(None)] * index.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            return None
        cut[axis] = slice(start, min(end, np.iinfo(np.int64).max), step)
    return index[tuple(cut)]


def _attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _name(value: ir.Value) -> str:
    assert value.name is not None, "every value of a loaded model has a name"
    return value.name
