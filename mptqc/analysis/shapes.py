"""Concrete shapes of every value, read off one run of the model on zeros."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from mptqc.errors import ModelError
from mptqc.runtime.session import create_session, run_arrays


def concrete_shapes(model: ir.Model, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Run the model once on zeros and return the shape of each float value, by name.

    Args:
        model: a model with one image input; its batch dimension may be symbolic, the others are fixed.
        batch: batch size used where the model leaves it open.

    Raises:
        ModelError: a dimension other than the batch is open, or the model does not run at this batch size.
    """
    proto = ir.to_proto(model)
    values = [out for node in proto.graph.node for out in node.output if out]
    del proto.graph.output[:]
    for position, name in enumerate(values):
        shape_name = f"mptqc.shape.{position}"
        proto.graph.node.append(onnx.helper.make_node("Shape", [name], [shape_name]))
        proto.graph.output.append(onnx.helper.make_tensor_value_info(shape_name, onnx.TensorProto.INT64, None))
    serialized: bytes = proto.SerializeToString()  # type: ignore[no-untyped-call] # protobuf has no types
    session = create_session(serialized, threads=1, graph_optimization=False)
    graph_input = model.graph.inputs[0]
    shape = input_shape(graph_input, batch)
    names = [output.name for output in proto.graph.output]
    try:
        found = run_arrays(session, names, {str(graph_input.name): np.zeros(shape, np.float32)})
    except ModelError as error:
        if graph_input.shape is not None and isinstance(graph_input.shape[0], int):
            raise
        raise ModelError(
            f"input {graph_input.name!r} leaves the batch open, but the model does not run at batch {shape[0]}: export "
            f"it with a fixed batch, or with shapes that follow the batch ({error})"
        ) from error
    shapes: dict[str, tuple[int, ...]] = {
        name: tuple(int(dim) for dim in dims) for name, dims in zip(values, found, strict=True)
    }
    shapes[str(graph_input.name)] = shape
    return shapes


def input_shape(graph_input: ir.Value, batch: int) -> tuple[int, ...]:
    """The input's shape with the batch put in where it is open.

    Raises:
        ModelError: the rank is unknown, or a dimension other than the first is open.
    """
    dims: Sequence[object] = () if graph_input.shape is None else tuple(graph_input.shape)
    if not dims or any(not isinstance(dim, int) for dim in dims[1:]):
        raise ModelError(
            f"input {graph_input.name!r} has shape {[str(dim) for dim in dims]}: only its first dimension "
            "(the batch) may be open; export the model with a fixed image size"
        )
    return tuple(dim if isinstance(dim, int) else batch for dim in dims)
