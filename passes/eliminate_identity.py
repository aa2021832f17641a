"""Remove nodes that pass their input on unchanged."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.edit import constant_of, is_op, producer, remove_dead, replace_value, scalar_of
from mptqc.graph.shapes import dims_of, equal_when_sizes_match
from mptqc.passes.base import Pass, PassResult

_BROADCASTING = ("Add", "Sub", "Mul", "Div")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EliminateIdentity(Pass):
    """Remove Identity, inference Dropout, and Cast, Reshape and Transpose that change nothing.

        y = Identity(x)
        z = Relu(y)          →      z = Relu(x)

        y = Div(x, Expand(n))      →   y = Div(x, n)         (Expand, if what reads it makes it as large anyway)

    A Reshape counts only if input and output shape are proved equal. A node between a graph input (or an
    initializer) and a graph output stays: an output must be made by a node. One run is a fixpoint.
    """

    name: ClassVar[str] = "eliminate-identity"

    def call(self, model: ir.Model) -> PassResult:
        """Join the Reshapes of a chain, then remove what does nothing, in graph order."""
        edits = 0
        for node in list(model.graph):
            if _shadows_reshape(node):
                inner = producer(node.inputs[0], "Reshape")
                assert inner is not None
                node.replace_input_with(0, inner.inputs[0])
                edits += 1
            if not _does_nothing(node):
                continue
            source, output = node.inputs[0], node.outputs[0]
            assert source is not None
            if output.is_graph_output() and (
                source.producer() is None or source.is_graph_output() or source.is_graph_input()
            ):
                continue
            replace_value(output, source)
            model.graph.remove(node, safe=True)
            logger.debug("removed %s %s", node.op_type, node.name)
            edits += 1
        if edits:
            remove_dead(model)
        return PassResult(model, edits)


def _does_nothing(node: ir.Node) -> bool:
    if is_op(node, "Identity"):
        return True
    if is_op(node, "Dropout"):
        return _is_inference_dropout(node)
    source, output = node.inputs[0] if node.inputs else None, node.outputs[0] if node.outputs else None
    if source is None or output is None:
        return False
    if is_op(node, "Cast"):
        return source.dtype is not None and source.dtype == node.attributes["to"].as_int()
    if is_op(node, "Reshape"):
        return equal_when_sizes_match(dims_of(source), dims_of(output))
    if is_op(node, "Expand"):
        read = not output.is_graph_output() and len(output.uses()) > 0 and dims_of(source) is not None
        return read and all(_expands_by_itself(use.node, output) for use in output.uses())
    if is_op(node, "Transpose") and "perm" in node.attributes:
        perm = list(node.attributes["perm"].as_ints())
        return perm == list(range(len(perm)))
    return False


def _expands_by_itself(reader: ir.Node, expanded: ir.Value) -> bool:
    """True for an element-wise op whose other operand surely has the expanded size."""
    dims = dims_of(expanded)
    others = [dims_of(value) for value in reader.inputs if value is not expanded]
    return is_op(reader, *_BROADCASTING) and dims is not None and None not in dims and others == [dims]


def _is_inference_dropout(node: ir.Node) -> bool:
    mask_read = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    training = node.inputs[2] if len(node.inputs) > 2 else None
    return not mask_read and (training is None or scalar_of(training) == 0)


def _shadows_reshape(node: ir.Node) -> bool:
    """True for the outer of Reshape(Reshape(x)) if its target does not copy a dimension of the inner's output."""
    if not is_op(node, "Reshape") or producer(node.inputs[0], "Reshape") is None:
        return False
    target = constant_of(node.inputs[1])
    return target is not None and 0 not in target.tolist()
