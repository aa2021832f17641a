"""Put the batch before the tokens where a model has them the other way, as torch's MultiheadAttention wants them.

    t = Transpose(x [B, T, C]; 1, 0, 2)
    l = Linear(t) [T, B, N]                              l' = Linear(x) [B, T, N]
    y = Transpose(l; 1, 0, 2)                      →     y = l'

Linears, norms and element-wise ops work on each row by itself, so whole regions [T, B, C] are turned; Transposes stay
at their ends alone. Passes after this one find Linears whose rows are an image's tokens, in order.
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.edit import Builder, add_initializer, constant_of, is_op, producer, remove_dead, replace_value
from mptqc.graph.shapes import Dim, dims_of
from mptqc.passes.base import Pass, PassResult

_SWAP = (1, 0, 2)
_ROW_BY_ROW = ("Add", "Sub", "Mul", "Div", "Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "Neg", "Sqrt", "Pow", "Softplus")


@dataclass(frozen=True)
class BatchFirst(Pass):
    """Turn every region of [T, B, C] that holds a Linear or a norm. One run is a fixpoint."""

    name: ClassVar[str] = "batch-first"

    def call(self, model: ir.Model) -> PassResult:
        """Turn node by node, in graph order."""
        dims = dims_of(model.graph.inputs[0]) if model.graph.inputs else None
        batch = dims[0] if dims else None
        edits = 0
        if batch is not None and any(_is_linear(node) and _tokens_first(node, batch) for node in model.graph):
            edits = sum(_turn(node, batch) for node in list(model.graph))
        if edits:
            remove_dead(model)
        return PassResult(model, edits)


def _is_linear(node: ir.Node) -> bool:
    weight = constant_of(node.inputs[1]) if is_op(node, "MatMul") else None
    return weight is not None and weight.ndim == 2


def _tokens_first(node: ir.Node, batch: Dim) -> bool:
    """True for an op that works row by row on rows [T, B], and whose constants can be turned with them."""
    output = dims_of(node.outputs[0]) if len(node.outputs) == 1 else None
    if output is None or len(output) != 3 or output[1] != batch or output[0] == batch:
        return False
    if _is_linear(node):
        return _goes_with(node.inputs[0], output)
    if is_op(node, "LayerNormalization"):
        return _goes_with(node.inputs[0], output) and node.attributes.get_int("axis", -1) in (-1, 2)
    return is_op(node, *_ROW_BY_ROW) and all(_goes_with(value, output) for value in node.inputs)


def _goes_with(value: ir.Value | None, output: tuple[Dim, ...]) -> bool:
    """True for an operand of the output's rows, and for a constant that is turned with them or need not be."""
    dims = dims_of(value)
    if dims is None:
        return False
    return len(dims) != 2 if constant_of(value) is not None else len(dims) == 3 and dims[:2] == output[:2]


def _turn(node: ir.Node, batch: Dim) -> bool:
    """Turn a node's operands and, behind it, its output back; two Transposes in a row are none."""
    above = _unswapped(node.inputs[0]) if _swaps(node) else None
    if above is not None and not (node.outputs[0].is_graph_output() and above.is_graph_output()):
        replace_value(node.outputs[0], above)
        return True
    if not _tokens_first(node, batch):
        return False
    for index, value in enumerate(node.inputs):
        dims, constant = dims_of(value), constant_of(value)
        if value is None or dims is None or len(dims) != 3:
            continue
        if constant is not None:
            assert isinstance(node.graph, ir.Graph)
            name = f"{value.name}/batch_first"
            node.replace_input_with(index, add_initializer(node.graph, name, constant.transpose(_SWAP)))
        else:
            node.replace_input_with(index, _unswapped(value) or _swapped(value, Builder(node, str(value.name))))
    _turn_back(node)
    return True


def _turn_back(node: ir.Node) -> None:
    """The output becomes [B, T, C]; what reads it reads it turned back."""
    output, graph = node.outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    assert output.shape is not None
    turned = _turned_shape(output)
    result = ir.val(f"{output.name}/tokens_first", type=output.type, shape=output.shape)
    back = ir.node("Transpose", [None], {"perm": list(_SWAP)}, outputs=[result], name=f"{output.name}/tokens_first")
    graph.insert_after(node, back)
    replace_value(output, result)
    back.replace_input_with(0, output)
    output.shape = turned


def _swaps(node: ir.Node) -> bool:
    return is_op(node, "Transpose") and "perm" in node.attributes and node.attributes["perm"].as_ints() == _SWAP


def _unswapped(value: ir.Value | None) -> ir.Value | None:
    """What `value` is the Transpose of, if it is one of the first two axes."""
    node = producer(value, "Transpose")
    return node.inputs[0] if node is not None and _swaps(node) else None


def _swapped(value: ir.Value, build: Builder) -> ir.Value:
    swapped = build.op("Transpose", [value], {"perm": list(_SWAP)}, name="batch_first")
    swapped.type, swapped.shape = value.type, _turned_shape(value)
    return swapped


def _turned_shape(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([value.shape[axis] for axis in _SWAP])
