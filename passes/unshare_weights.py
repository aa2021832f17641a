"""Give every Linear, convolution and norm its own weights."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.edit import constant_of, is_op, producer, set_initializer
from mptqc.passes.base import Pass, PassResult

logger = logging.getLogger(__name__)

# op → the inputs that hold parameters
_PARAMETERS: dict[str, tuple[int, ...]] = {
    "MatMul": (1,),
    "Gemm": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "LayerNormalization": (1, 2),
}


@dataclass(frozen=True)
class UnshareWeights(Pass):
    """Copy an initializer for each further use as weight, bias, γ or β. One run is a fixpoint.

    a = MatMul(x, W); b = MatMul(y, W)    →    a = MatMul(x, W); b = MatMul(y, W_1)

    The copies share their memory until a pass gives one of them new values.
    """

    name: ClassVar[str] = "unshare-weights"

    def call(self, model: ir.Model) -> PassResult:
        """The first use keeps the initializer, unless something that is no parameter reads it too."""
        sites = [(node, index) for node in model.graph for index in _parameter_inputs(node)]
        places = set(sites)
        kept: set[ir.Value] = set()
        edits = 0
        for node, index in sites:
            value = node.inputs[index]
            array = constant_of(value)
            if value is None or array is None:
                continue
            read_otherwise = any((use.node, use.idx) not in places for use in value.uses())
            if value not in kept and not read_otherwise and not value.is_graph_output():
                kept.add(value)
                continue
            kept.add(set_initializer(node, index, array))
            edits += 1
        return PassResult(model, edits)


def _parameter_inputs(node: ir.Node) -> list[int]:
    if is_op(node, *_PARAMETERS):
        return [index for index in _PARAMETERS[node.op_type] if index < len(node.inputs)]
    if is_op(node, "Add"):
        product = producer(node.inputs[0], "MatMul")
        if product is not None and constant_of(product.inputs[1]) is not None:
            return [1]
    return []
