"""Compute in float32 what an exporter computes in float64."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.convert_precision import convert_to_float32
from mptqc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class NarrowDoubles(Pass):
    """Make float64 values float32, such as norms in half-precision exports. One run is a fixpoint.

    d = Cast(x; to=DOUBLE); s = Mul(d, d)    →    d = Cast(x; to=FLOAT); s = Mul(d, d)

    To be run when shape arithmetic is folded. A model with a float64 output, whose user wants the digits, stays.
    """

    name: ClassVar[str] = "narrow-doubles"

    def call(self, model: ir.Model) -> PassResult:
        """Retype all at once."""
        if any(output.dtype is ir.DataType.DOUBLE for output in model.graph.outputs):
            return PassResult(model, 0)
        return PassResult(model, convert_to_float32(model, (ir.DataType.DOUBLE,)))
