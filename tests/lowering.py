"""The block of conftest quantized and lowered to the operators of `ai.mptqc`."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.native_nodes import Lowering, lowering_report, native_nodes
from mptqc.passes.base import run_passes
from mptqc.passes.lower_to_native import LowerToNative
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import QuantPlan

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]
Edit = Callable[[ir.Model], None]
X = np.random.default_rng(1).normal(size=(3, 7, 12)).astype(np.float32)
WHOLE_BLOCK = {"LayerNormQuantize": 1, "LinearQuantize": 5, "AttentionQuantize": 1, "Linear": 1}


def lower(model: ir.Model, plan: QuantPlan) -> tuple[ir.Model, ir.Model]:
    """The portable model, and a copy of it lowered."""
    run_passes(model, [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights(plan)])
    native = ir.from_proto(ir.to_proto(model))
    LowerToNative(concrete_shapes(native), concrete_shapes(native, batch=2))(native)
    onnx.checker.check_model(ir.to_proto(native))
    return model, native


def native_counts(model: ir.Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in native_nodes(model)))


def value(model: ir.Model, name: str) -> ir.Value:
    return next(out for node in model.graph for out in node.outputs if out.name == name)


def node(model: ir.Model, name: str) -> ir.Node:
    return next(each for each in model.graph if each.name == name)


def refusals(model: ir.Model) -> list[Lowering]:
    return [each for each in lowering_report(model) if each.reason]


def make_output(name: str, shape: list[int | str]) -> Edit:
    """A value of the float block also becomes an output of the model."""

    def edit(model: ir.Model) -> None:
        found = value(model, name)
        found.dtype, found.shape = ir.DataType.FLOAT, ir.Shape(shape)
        model.graph.outputs.append(found)

    return edit


FLOAT_GELU = {**WHOLE_BLOCK, "LinearQuantize": 4, "Linear": 2}
