"""Models in other float types, told apart and turned into float32."""

import logging
from collections.abc import Container

import numpy as np
import onnx_ir as ir

logger = logging.getLogger(__name__)

SOURCE_PRECISION_KEY = "mptqc.source_precision"
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Attributes that hold a data type: Cast and Random* name the output's, EyeLike and the rest likewise.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")


def half_precision_of(model: ir.Model) -> str | None:
    """Return "float16" or "bfloat16" if an input or an initializer is of that type, else None."""
    values = [*model.graph.inputs, *(value for graph in model.graphs() for value in graph.initializers.values())]
    for value in values:
        if value.dtype in _HALF:
            return "float16" if value.dtype is ir.DataType.FLOAT16 else "bfloat16"
    return None


def convert_half_to_float32(model: ir.Model) -> None:
    """Make every half-precision type float32, in place: weights, constants, casts, inputs and outputs.

    Records the former precision in the metadata: constants such as √2 were rounded to it.
    """
    model.metadata_props[SOURCE_PRECISION_KEY] = half_precision_of(model) or "float32"
    convert_to_float32(model, _HALF)
    logger.info("converted from %s to float32", model.metadata_props[SOURCE_PRECISION_KEY])


def convert_to_float32(model: ir.Model, types: Container[ir.DataType | None]) -> int:
    """Make the given float types float32 wherever they occur, in place; return how many places that were."""
    edits = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype in types:
                value.const_value = _as_float32(value.const_value)
                edits += 1
            edits += _retype(value, types)
        for value in graph.inputs:
            edits += _retype(value, types)
        for node in graph:
            edits += _convert_node(node, types)
    return edits


def _retype(value: ir.Value, types: Container[ir.DataType | None]) -> int:
    if value.dtype not in types or value.dtype is None:
        return 0
    value.dtype = ir.DataType.FLOAT
    return 1


def _as_float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _convert_node(node: ir.Node, types: Container[ir.DataType | None]) -> int:
    edits = 0
    for name, attribute in list(node.attributes.items()):
        if attribute.type is ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype in types:
                node.attributes[name] = ir.AttrTensor(name, _as_float32(tensor))
                edits += 1
        elif name in _TYPE_ATTRIBUTES and attribute.type is ir.AttributeType.INT and attribute.as_int() in types:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            edits += 1
    return edits + sum(_retype(output, types) for output in node.outputs)
