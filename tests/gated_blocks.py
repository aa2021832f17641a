"""The block of conftest with a gate in the place of its GELU: activation(xG + c)·(xW₁ + b₁)."""

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder
from mptqc.graph.match import SITE_KEY, find_linears
from mptqc.plan import LayerPlan, QuantPlan

GATE, FC1, FC2 = (f"block00.{part}" for part in ("gate", "fc1", "fc2"))


def gated(model: ir.Model, activation: str = "silu") -> ir.Model:
    """The block gated by `activation`: "silu", "gelu", or "none"."""
    random = np.random.default_rng(5)
    linears = {linear.site: linear for linear in find_linears(model)}
    fc1, fc2 = linears[FC1], linears[FC2]
    build = Builder(fc2.matmul, "gate")
    weight = (random.standard_normal(fc1.weight.shape) / np.sqrt(len(fc1.weight))).astype(np.float32)
    product = build.op("MatMul", [fc1.input, build.constant("weight", weight)])
    product_node = product.producer()
    assert product_node is not None
    product_node.metadata_props[SITE_KEY] = GATE
    bias = random.standard_normal(weight.shape[1]).astype(np.float32)
    gate = build.op("Add", [product, build.constant("bias", bias)])
    if activation == "silu":
        gate = build.op("Mul", [gate, build.op("Sigmoid", [gate])])
    elif activation == "gelu":
        gate = build.op("Gelu", [gate])
    gelu = fc2.input.producer()
    fc2.matmul.replace_input_with(0, build.op("Mul", [gate, fc1.output]))
    assert gelu is not None
    model.graph.remove(gelu, safe=True)
    return model


def with_gate(plan: QuantPlan, model: ir.Model) -> QuantPlan:
    """The plan of the block, its gate quantized as fc1 is and fc2's input as fc1's."""
    layers = {layer.site: layer for layer in plan.layers}
    fc1 = layers[FC1]
    more = [LayerPlan(site=site, weight_bits=fc1.weight_bits, input=fc1.input) for site in (GATE, FC2)]
    kept = [layer for layer in plan.layers if layer.site != FC2]
    weight = next(linear.weight for linear in find_linears(model) if linear.site == GATE)
    scale = np.abs(weight).max(axis=0) / np.float32(2 ** (fc1.weight_bits - 1) - 1)
    return plan.model_copy(update={"layers": (*kept, *more)}).with_arrays({f"{GATE}/weight_scale": scale})
