"""The tensors that full coverage quantizes besides operands of products, and those it cannot (METHOD, Full coverage).

    <linear>.output       a Linear's output that is no operand: GELU's input, a branch that is added to the stream
    <norm>.output         a norm's output that is no operand: what a mean is taken of
    <norm>.input          what a norm reads, if neither of these: the residual stream
    <attention>.scores    what a Softmax reads
    <attention>.context   an attention's output that is no operand
    <linear>.sum          the sum that a Linear's output enters, if no norm reads it

`MarkTensors` puts an Identity behind each, which bears its site and kind: so a tensor is known also where the model is
cut and the nodes that tell what it is are in another piece.

A tensor is a value that is computed from the image and leads to a product or a norm. Movement computes nothing: a
tensor is quantized above it. What is neither a tensor named here, nor an operand, nor within an attention's scores, is
refused by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from mptqc.graph.edit import constant_of, is_op, only_consumer, producer
from mptqc.graph.layout import MOVEMENT_OPS
from mptqc.graph.match import (
    SCORE_OPS,
    Attention,
    Linear,
    Norm,
    find_attentions,
    find_linears,
    find_norms,
    match_linear_output,
    site_of,
)
from mptqc.plan import Refusal
from mptqc.recipe import TensorKind

REFUSED = "full coverage"
"""What a `Refusal` of a tensor is about."""

KIND_KEY = "mptqc.tensor"
"""Where a mark keeps the kind of its tensor."""

_JOINING_OPS = ("Concat", "Pad", "Expand")
_MOVING_OPS = (*MOVEMENT_OPS, *_JOINING_OPS)
_SHAPE_OPS = ("Shape", "Size")


@dataclass(frozen=True)
class Tensor:
    """A value to be quantized."""

    site: str
    kind: TensorKind
    value: ir.Value


@dataclass(frozen=True)
class Tensors:
    """What full coverage adds, in graph order, and what it leaves float."""

    found: tuple[Tensor, ...]
    refusals: tuple[Refusal, ...]


def find_tensors(model: ir.Model) -> Tensors:
    """Every tensor of a float model with stamped sites; a second call on the same model gives the same."""
    return _Finder(model).find()


def find_marked(model: ir.Model) -> list[Tensor]:
    """Every tensor that has a mark, in graph order."""
    found = []
    for node in model.graph:
        if is_op(node, "Identity") and KIND_KEY in node.metadata_props:
            value = node.inputs[0]
            assert value is not None
            found.append(Tensor(site_of(node), TensorKind(node.metadata_props[KIND_KEY]), value))
    return found


class _Finder:
    """What the rules ask of the whole graph, gathered once."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._norms: dict[ir.Node, Norm] = {norm.node: norm for norm in find_norms(model)}
        self._linears: dict[ir.Node, Linear] = {linear.matmul: linear for linear in find_linears(model)}
        self._attentions = find_attentions(model)
        self._by_softmax: dict[ir.Node, Attention] = {each.softmax: each for each in self._attentions}
        self._by_context: dict[ir.Node, Attention] = {each.context: each for each in self._attentions}
        self._operands = {(node, 0) for node in self._linears}
        for each in self._attentions:
            self._operands |= {(product, index) for product in (each.scores, each.context) for index in (0, 1)}
        self._hidden = {linear.matmul.outputs[0] for linear in self._linears.values()}
        for each in self._attentions:
            self._hidden |= _score_path(each) | _row_scaling(each)
        self._hidden |= {node.outputs[0] for node in model.graph if is_op(node, "Gelu") and _is_folded(node)}

    def find(self) -> Tensors:
        """Judge every computed value."""
        computed, inner = self._computed(), self._inner()
        found: list[Tensor] = []
        refusals: list[Refusal] = []
        names: dict[str, int] = {}
        for node in self._model.graph:
            for value in node.outputs:
                if value not in computed or not self._is_tensor(value, node):
                    continue
                name, kind = self._name(value, node), self._kind(value, node)
                if value not in inner:
                    if name:
                        refusals.append(_refuse(name, "only the model's output is computed from it"))
                    continue
                if not name or kind is None:
                    refusals.append(_refuse(str(node.name), f"the output of {node.op_type} is no tensor that is known"))
                    continue
                if value.is_graph_output():
                    refusals.append(_refuse(name, "it is an output of the model"))
                    continue
                names[name] = names.get(name, -1) + 1
                found.append(Tensor(f"{name}.{names[name]}" if names[name] else name, kind, value))
        return Tensors(tuple(found), tuple(refusals))

    def _computed(self) -> set[ir.Value]:
        """Values whose numbers, not only whose shapes, come from the image."""
        found = set(self._model.graph.inputs)
        for node in self._model.graph:
            if not is_op(node, *_SHAPE_OPS) and any(value in found for value in node.inputs):
                found.update(node.outputs)
        return found

    def _inner(self) -> set[ir.Value]:
        """Values from which a product or a norm is computed."""
        found: set[ir.Value] = set()
        for node in reversed(self._model.graph):
            ends = node in self._linears or node in self._norms or is_op(node, "MatMul", "Conv")
            if ends or any(value in found for value in node.outputs):
                found.update(value for value in node.inputs if value is not None)
        return found

    def _is_tensor(self, value: ir.Value, node: ir.Node) -> bool:
        """True for a value that something else than a product reads as numbers."""
        if any(use.node in self._by_softmax for use in value.uses()):
            return True
        if value in self._hidden or is_op(node, *_MOVING_OPS):
            return False
        return any(use not in self._operands for use in _read(value)) or value.is_graph_output()

    def _name(self, value: ir.Value, node: ir.Node) -> str:
        """The tensor's site, or nothing if there is no rule for it."""
        for use in value.uses():
            if use.node in self._by_softmax:
                return f"{self._by_softmax[use.node].site}.scores"
        linear = match_linear_output(value)
        if linear is not None:
            return f"{linear.site}.output"
        if node in self._norms:
            return f"{self._norms[node].site}.output"
        norms = [self._norms[reader] for reader, _ in _read(value) if reader in self._norms]
        if norms:
            return f"{norms[0].site}.input"
        if node in self._by_context:
            return f"{self._by_context[node].site}.context"
        if is_op(node, "Add"):
            entering = [linear for operand in node.inputs if (linear := _linear_above(operand)) is not None]
            return f"{entering[-1].site}.sum" if entering else ""
        return ""

    def _kind(self, value: ir.Value, node: ir.Node) -> TensorKind | None:
        """By what reads it, else by what makes it."""
        if any(use.node in self._by_softmax for use in value.uses()):
            return TensorKind.SCORES
        readers = [reader for reader, _ in _read(value)]
        if any(reader in self._norms for reader in readers):
            return TensorKind.NORM_INPUT
        if any(is_op(reader, "Gelu") for reader in readers):
            return TensorKind.GELU_INPUT
        if node in self._norms:
            return TensorKind.NORM_OUTPUT
        if match_linear_output(value) is not None or node in self._by_context:
            return TensorKind.PRODUCT_OUTPUT
        return TensorKind.SUM if is_op(node, "Add") else None


def readers_of(value: ir.Value) -> list[ir.Node]:
    """The nodes that compute with `value`, through movement."""
    return [node for node, _ in _read(value)]


def _read(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """(node, input) of everything that computes with `value`, through movement."""
    frontier, seen = [value], {value}
    while frontier:
        for use in frontier.pop(0).uses():
            if is_op(use.node, *_SHAPE_OPS):
                continue
            if not is_op(use.node, *_MOVING_OPS):
                yield use.node, use.idx
                continue
            onward = [out for out in use.node.outputs if out not in seen]
            seen.update(onward)
            frontier.extend(onward)


def _linear_above(value: ir.Value | None) -> Linear | None:
    """The Linear whose output `value` is or is moved from."""
    while value is not None:
        linear = match_linear_output(value)
        if linear is not None:
            return linear
        node = producer(value, *_MOVING_OPS)
        if node is None:
            return None
        value = next((operand for operand in node.inputs if operand is not None and constant_of(operand) is None), None)
    return None


def _score_path(attention: Attention) -> set[ir.Value]:
    """The values from the product of q and k to the softmax, and the probabilities."""
    start = attention.scores.outputs[0]

    def path_to(value: ir.Value | None) -> set[ir.Value]:
        """The values from the start to `value`, both included; none if no path leads there."""
        node = producer(value, *SCORE_OPS)
        if value is start or value is None or node is None:
            return {start} & {value}
        found = set().union(*map(path_to, node.inputs))
        return found | {value} if found else found

    return path_to(attention.softmax.inputs[0]) | {start, attention.softmax.outputs[0]}


def _row_scaling(attention: Attention) -> set[ir.Value]:
    """What `ScaleProbabilities` put around the second product: the rows' scales, and the product before they return."""
    if attention.row_scale is None:
        return set()
    return {value for value in attention.row_scale.inputs if value is not None}


def _is_folded(gelu: ir.Node) -> bool:
    """True if `FoldGelu` scaled the channels of this GELU: what is quantized comes after the scale."""
    scaled = only_consumer(gelu.outputs[0])
    return (
        is_op(scaled, "Mul") and scaled is not None and any(constant_of(value) is not None for value in scaled.inputs)
    )


def _refuse(site: str, reason: str) -> Refusal:
    return Refusal(site=site, what=REFUSED, reason=f"it stays float: {reason}")
