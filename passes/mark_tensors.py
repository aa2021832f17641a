"""Put a mark behind each tensor that full coverage quantizes: an Identity that bears its site and kind.

    x -> readers    =>    x -> Identity -> readers

Where a marked model is cut into pieces, each mark is in one of them, whichever nodes tell what the tensor is. The stage
does not change; a second run finds every tensor marked.
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.match import SITE_KEY
from mptqc.graph.tensors import KIND_KEY, find_marked, find_tensors
from mptqc.passes.base import Pass, PassResult, Stage


@dataclass(frozen=True)
class MarkTensors(Pass):
    """Mark every tensor that full coverage quantizes."""

    name: ClassVar[str] = "mark-tensors"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.SMOOTHED,)

    def call(self, model: ir.Model) -> PassResult:
        """Find the tensors that have no mark yet, then mark them."""
        done = {tensor.site for tensor in find_marked(model)}
        found = [tensor for tensor in find_tensors(model).found if tensor.site not in done]
        for tensor in found:
            node = tensor.value.producer()
            assert node is not None
            assert isinstance(node.graph, ir.Graph)
            mark = ir.node("Identity", [tensor.value], name=f"{tensor.site}/mark")
            mark.metadata_props.update({SITE_KEY: tensor.site, KIND_KEY: tensor.kind})
            mark.outputs[0].name = f"{tensor.site}/marked"
            mark.outputs[0].shape, mark.outputs[0].type = tensor.value.shape, tensor.value.type
            uses = [use for use in tensor.value.uses() if use.node is not mark]
            node.graph.insert_after(node, mark)
            for use in uses:
                use.node.replace_input_with(use.idx, mark.outputs[0])
        return PassResult(model, len(found))
