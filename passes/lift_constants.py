"""Turn every Constant node into an initializer."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.edit import add_initializer, constant_of, is_op
from mptqc.passes.base import Pass, PassResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiftConstants(Pass):
    """Give each Constant node's readers an initializer; one run is a fixpoint, a second changes nothing.

        y = Constant()            initializer y
        z = Add(x, y)      →      z = Add(x, y)

    A Constant that is itself a graph output stays: an output must be made by a node.
    """

    name: ClassVar[str] = "lift-constants"

    def call(self, model: ir.Model) -> PassResult:
        """Find the nodes, then register their values and remove them."""
        sites = [node for node in model.graph if is_op(node, "Constant") and not node.outputs[0].is_graph_output()]
        for node in sites:
            old = node.outputs[0]
            array = constant_of(old)
            assert array is not None, "load_model refuses sparse constants"
            name = old.name or "constant"
            old.name = None
            new = add_initializer(model.graph, name, array)
            ir.convenience.replace_all_uses_with(old, new)
            model.graph.remove(node, safe=True)
            logger.debug("lifted %s", name)
        return PassResult(model, len(sites))
