"""Models with operators of `ai.mptqc`, run in numpy by onnx's reference evaluator."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from mptqc.reference.custom_op_bounds import output_bounds
from mptqc.reference.custom_ops import DOMAIN

OPERATORS = ("LayerNormQuantize", "Linear", "LinearQuantize", "Attention", "AttentionQuantize", "QuantizePatches")


def _operator(op_type: str) -> type[OpRun]:
    def run(self: OpRun, *inputs: NDArray[np.generic] | None, **_: object) -> tuple[NDArray[np.generic]]:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in self.onnx_node.attribute}
        texts = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
        return (output_bounds(op_type, texts, inputs, slack=0)[0],)

    return type(op_type, (OpRun,), {"op_domain": DOMAIN, "_run": run})


def run_native(model: ir.Model, feeds: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    """The model's outputs in numpy."""
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[_operator(op_type) for op_type in OPERATORS])
    return list(evaluator.run(None, dict(feeds)))
