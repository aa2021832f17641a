"""Shapes and types of every value, by ONNX shape inference."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mptqc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class InferShapes(Pass):
    """Fill in shapes and types; what cannot be inferred stays unknown. The nodes do not change."""

    name: ClassVar[str] = "infer-shapes"

    def call(self, model: ir.Model) -> PassResult:
        """Run shape inference with data propagation; one run is a fixpoint."""
        modified = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model).modified
        return PassResult(model, int(modified))
