"""A model for the CUDA provider as the CPU runs it, where its operators mean the same on float32."""

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

from mptqc.runtime.session import PROVIDER_KEY


def cpu_form(model: ir.Model) -> onnx.ModelProto:
    """A copy of the model with float32 in place of what `UseFloat16` made float16, and no provider named.

    Constants keep their float16 values. A model that names no provider is copied as it is.
    """
    proto = ir.to_proto(model)
    kept = [entry for entry in proto.metadata_props if entry.key != PROVIDER_KEY]
    if len(kept) == len(proto.metadata_props):
        return proto
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    initializers = [_widened(tensor) for tensor in proto.graph.initializer]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(initializers)
    for info in proto.graph.value_info:
        if info.type.tensor_type.elem_type == TensorProto.FLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in proto.graph.node:
        for attribute in node.attribute if node.op_type == "Cast" else ():
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    return proto


def _widened(tensor: TensorProto) -> TensorProto:
    if tensor.data_type != TensorProto.FLOAT16:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
