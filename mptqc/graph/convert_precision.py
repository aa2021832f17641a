"""float16 and bfloat16 models, told apart and turned into float32."""

import logging

import numpy as np
import onnx_ir as ir

logger = logging.getLogger(__name__)

SOURCE_PRECISION_KEY = "mptqc.source_precision"
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Attributes that hold a data type: Cast and Random* name the output's, EyeLike and the rest likewise.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision")


def half_precision_of(model: ir.Model) -> str | None:
    """Return "float16" or "bfloat16" if an input or an initializer is of that type, else None."""
    values = [*model.graph.inputs, *(value for graph in model.graphs() for value in graph.initializers.values())]
    for value in values:
        if value.dtype in _HALF:
            return "float16" if value.dtype is ir.DataType.FLOAT16 else "bfloat16"
    return None


def convert_to_float32(model: ir.Model) -> None:
    """Make every half-precision type float32, in place: weights, constants, casts, inputs and outputs.

    Records the former precision in the metadata: constants such as √2 were rounded to it.
    """
    model.metadata_props[SOURCE_PRECISION_KEY] = half_precision_of(model) or "float32"
    for graph in model.graphs():
        for value in graph.initializers.values():
            value.const_value = _as_float32(value.const_value)
            _retype(value)
        for value in graph.inputs:
            _retype(value)
        for node in graph:
            _convert_node(node)
    logger.info("converted from %s to float32", model.metadata_props[SOURCE_PRECISION_KEY])


def _retype(value: ir.Value) -> None:
    if value.dtype in _HALF:
        value.dtype = ir.DataType.FLOAT


def _as_float32(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    if tensor is None or tensor.dtype not in _HALF:
        return tensor
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _convert_node(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type is ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype in _HALF:
                converted = _as_float32(tensor)
                assert converted is not None
                node.attributes[name] = ir.AttrTensor(name, converted)
        elif name in _TYPE_ATTRIBUTES and attribute.type is ir.AttributeType.INT and attribute.as_int() in _HALF:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    for output in node.outputs:
        _retype(output)
