"""Constant folding and removal of shape arithmetic, by onnxsim."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.constant_folding import fold_constants
from mptqc.passes.base import Pass, PassResult

logger = logging.getLogger(__name__)

# These build larger ops than the canonical form has, which later passes would only take apart again: flattened rows,
# Gemm between two Reshapes, one MatMul and a Split for q, k and v, Attention; or they take the ½ of a GELU into
# the convolution after it. Norms and GELU are fused by FuseLayerNorm and FuseGelu, which check the constants.
SKIPPED_OPTIMIZERS = (
    "eliminate_reshape_around_elementwise",
    "fuse_attention",
    "fuse_gelu",
    "fuse_gqa",
    "fuse_layer_norm",
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_mul_into_conv",
    "fuse_preceding_mul_into_conv",
    "fuse_qkv",
    "fuse_rms_norm",
    "fuse_rope",
    "fuse_transpose_into_gemm",
)
# onnxsim takes one message of at most 2 GiB. In a larger model the weights are shown to it as inputs.
_MESSAGE_BYTES = 1_900_000_000
_HIDDEN_BYTES = 1 << 20


@dataclass(frozen=True)
class Simplify(Pass):
    """Fold constants, drop no-ops and shape arithmetic; dynamic axes stay dynamic. A second run finds little."""

    name: ClassVar[str] = "simplify"

    def call(self, model: ir.Model) -> PassResult:
        """Send the graph through onnxsim and put its result in the place of the graph.

        Raises:
            ModelError: the model is not valid ONNX.
        """
        before = _signature(model.graph)
        hidden = _hide_weights(model)
        proto = fold_constants(ir.to_proto(model), SKIPPED_OPTIMIZERS)
        model.graph = ir.from_proto(proto).graph
        _show_weights(model, hidden)
        return PassResult(model, len(before ^ _signature(model.graph)))


def _signature(graph: ir.Graph) -> set[tuple[str, str | None]]:
    """What tells an untouched node from a new one: its op and the name of its first output."""
    return {(node.op_type, node.outputs[0].name) for node in graph}


def _hide_weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Turn large initializers into inputs if the model is too large for one message; return their tensors by name."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    if sum(tensor.nbytes for tensor in tensors.values() if tensor is not None) <= _MESSAGE_BYTES:
        return {}
    hidden = {name: each for name, each in tensors.items() if each is not None and each.nbytes >= _HIDDEN_BYTES}
    for name, tensor in hidden.items():
        value = model.graph.initializers.pop(name)
        value.const_value = None
        value.shape, value.dtype = ir.Shape(tensor.numpy().shape), tensor.dtype
        model.graph.inputs.append(value)
    return hidden


def _show_weights(model: ir.Model, hidden: dict[str, ir.TensorProtocol]) -> None:
    for value in list(model.graph.inputs):
        tensor = hidden.get(value.name or "")
        if tensor is None:
            continue
        model.graph.inputs.remove(value)
        if not value.uses():
            continue
        value.const_value = tensor
        model.graph.register_initializer(value)
