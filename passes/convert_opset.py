"""Raise the opset of the default domain to 21.

Between opsets 13 and 21 most ops only gained types. The exceptions have an adapter below; an op that changed
its meaning and has none is refused by name.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.errors import ModelError
from mptqc.graph.edit import add_initializer, is_op
from mptqc.passes.base import Pass, PassResult

logger = logging.getLogger(__name__)

OPSET = 21
IR_VERSION = 10

Adapter = Callable[[ir.Graph, ir.Node], None]


def _move_axes_to_input(graph: ir.Graph, node: ir.Node) -> None:
    """ReduceX(data; axes) → ReduceX(data, axes), opset 18."""
    axes = node.attributes.pop("axes", None)
    if axes is None:
        return
    name = f"{node.name or node.outputs[0].name}/axes"
    value = add_initializer(graph, name, np.array(axes.as_ints(), np.int64))
    node.resize_inputs(2)
    node.replace_input_with(1, value)


def _name_split_outputs(graph: ir.Graph, node: ir.Node) -> None:
    """Split(x) into equal parts → Split(x; num_outputs), opset 18."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _rename_grid_modes(graph: ir.Graph, node: ir.Node) -> None:
    """GridSample mode bilinear → linear, bicubic → cubic, opset 20."""
    renamed = {"bilinear": "linear", "bicubic": "cubic"}
    mode = node.attributes.get_string("mode", "bilinear") or "bilinear"
    node.attributes["mode"] = ir.AttrString("mode", renamed.get(mode, mode))


def _keep_roi_align_default(graph: ir.Graph, node: ir.Node) -> None:
    """RoiAlign of opset < 16 knows only what opset 16 calls output_half_pixel."""
    if "coordinate_transformation_mode" not in node.attributes:
        node.attributes["coordinate_transformation_mode"] = ir.AttrString(
            "coordinate_transformation_mode", "output_half_pixel"
        )


# op → (the opset that changed it, what to do)
ADAPTERS: dict[str, tuple[int, Adapter]] = {
    **{
        f"Reduce{kind}": (18, _move_axes_to_input)
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
    },
    "Split": (18, _name_split_outputs),
    "GridSample": (20, _rename_grid_modes),
    "RoiAlign": (16, _keep_roi_align_default),
}
# op → the opset that changed its meaning; no vision transformer needs them.
REFUSED: dict[str, int] = {"DFT": 20, "GroupNormalization": 21}


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Bring a model of opset 13 to 20 to opset 21; one of 21 to 24 stays. A second run changes nothing.

    y = ReduceMean(x; axes=[-1])    →    y = ReduceMean(x, axes)
    """

    name: ClassVar[str] = "convert-opset"

    def call(self, model: ir.Model) -> PassResult:
        """Adapt the nodes, then the version numbers.

        Raises:
            ModelError: an op changed its meaning and has no adapter.
        """
        source = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
        ir_version = max(model.ir_version, IR_VERSION)
        edits = int(model.ir_version != ir_version)
        model.ir_version = ir_version
        if source >= OPSET:
            return PassResult(model, edits)
        for node in model.graph:
            if is_op(node, *REFUSED) and source < REFUSED[node.op_type]:
                raise ModelError(
                    f"{node.op_type} ({node.name}) of opset {source} means something else in opset {OPSET}; export the "
                    f"model with opset {REFUSED[node.op_type]} or later"
                )
        sites = [node for node in model.graph if is_op(node, *ADAPTERS) and source < ADAPTERS[node.op_type][0]]
        for node in sites:
            ADAPTERS[node.op_type][1](model.graph, node)
            logger.debug("adapted %s %s", node.op_type, node.name)
        for node in model.graph:
            node.version = None
        model.opset_imports[""] = OPSET
        return PassResult(model, edits + len(sites) + 1)
