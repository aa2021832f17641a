"""Reading ONNX files, refusing what mptqc cannot compile, and writing results whole or not at all."""

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass, RemoveUnusedOpsetsPass

from mptqc.errors import ModelError, OutputError
from mptqc.graph.acceptance import check_graph, check_proto
from mptqc.graph.convert_precision import convert_half_to_float32, half_precision_of

logger = logging.getLogger(__name__)

# Protocol buffers stop at 2 GiB; the rest of the message needs some room too.
EXTERNAL_DATA_BYTES = 1_900_000_000
# Tensors below this stay inside the .onnx file, so that shapes and scalars can be read without the data file.
EXTERNAL_TENSOR_BYTES = 1024
_READ_BLOCK_BYTES = 1 << 20


def load_model(path: str | Path, *, convert_fp16: bool = False) -> ir.Model:
    """Read a float ONNX model: functions inlined, external data mapped in, everything mptqc cannot compile refused.

    Args:
        path: the .onnx file; its external data must lie in the same folder or below it.
        convert_fp16: turn a float16 or bfloat16 model into float32, inputs and outputs included.

    Returns:
        The model at its own opset (13 to 24); every initializer can be read and serialized without the folder.

    Raises:
        ModelError: the file is missing, damaged, not ONNX, or a model that mptqc does not compile.
    """
    path = Path(path)
    proto = _read_proto(path)
    check_proto(proto, path)
    _check_external_data(proto, path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"{path.name} is not valid ONNX: {first_line}; export it again") from error
    model = ir.from_proto(proto)
    _map_external_data(model, path)
    if model.functions:
        model = InlinePass()(model).model
        logger.debug("%s: functions inlined", path.name)
    RemoveUnusedOpsetsPass()(model)
    RemoveInitializersFromInputsPass()(model)
    precision = half_precision_of(model)
    if precision is not None and not convert_fp16:
        raise ModelError(
            f"{path.name} is a {precision} model; mptqc compiles float32 models. Export it in float32, or pass "
            "--convert-fp16 to convert its weights, inputs and outputs"
        )
    if precision is not None:
        convert_half_to_float32(model)
    check_graph(model, path)
    return model


def model_digest(path: str | Path) -> str:
    """Return the sha256 (hex) of the model file and of its external data files, in the order of their names.

    Raises:
        ModelError: a file is missing, damaged or outside the model's folder.
    """
    path = Path(path)
    proto = _read_proto(path)
    _check_external_data(proto, path)
    digest = hashlib.sha256()
    locations = sorted({_external_entries(tensor).get("location", "") for tensor in _external_tensors(proto)})
    for file in [path, *(path.parent / location for location in locations)]:
        with file.open("rb") as stream:
            while block := stream.read(_READ_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def serialize(model: ir.Model) -> bytes:
    """Return the model as one ONNX message; the same model gives the same bytes.

    Raises:
        OutputError: the model is larger than one message can be (2 GB); `save_model` can write it.
    """
    size = _initializer_bytes(model)
    if size > EXTERNAL_DATA_BYTES:
        raise OutputError(
            f"the model holds {size / 1e9:.1f} GB of weights, more than one ONNX message can; write it with "
            "save_model, which puts the weights in a data file"
        )
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)  # type: ignore[no-untyped-call]  # generated
    return content


def save_model(model: ir.Model, path: str | Path) -> None:
    """Write the model beside `path` and move it there, so that a failure leaves no half-written file.

    Above 1.9 GB the weights go to `<stem>.onnx.data` in the same folder.

    Raises:
        OutputError: the folder does not exist or the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of the .onnx file to write")
    if not path.parent.is_dir():
        raise OutputError(f"{path.name} cannot be written: the folder {path.parent} does not exist; create it first")
    try:
        with tempfile.TemporaryDirectory(prefix=".mptqc-", dir=path.parent) as folder:
            _write(model, path, Path(folder))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another place") from error


def _write(model: ir.Model, path: Path, folder: Path) -> None:
    beside = folder / path.name
    if _initializer_bytes(model) <= EXTERNAL_DATA_BYTES:
        beside.write_bytes(serialize(model))
    else:
        data_name = f"{path.stem}.onnx.data"
        ir.save(model, beside, external_data=data_name, size_threshold_bytes=EXTERNAL_TENSOR_BYTES)
        (folder / data_name).replace(path.parent / data_name)
    beside.replace(path)


def _initializer_bytes(model: ir.Model) -> int:
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def _read_proto(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise ModelError(f"{path} does not exist; check the path of the model")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the .onnx file in it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if not content:
        raise ModelError(f"{path} is empty (0 bytes); export or copy the model again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)  # type: ignore[no-untyped-call]  # generated
    except DecodeError as error:
        # An ONNX file starts with field 1 (ir_version), a one-byte number: 08 0a and the like.
        damaged = len(content) > 1 and content[0] == 0x08 and content[1] <= max(onnx.IR_VERSION, 64)
        if damaged:
            raise ModelError(
                f"{path} starts like an ONNX file but its {len(content)} bytes cannot be parsed to the end: it is "
                "truncated or damaged; export or copy it again"
            ) from error
        raise ModelError(f"{path} is not an ONNX file; export the model to ONNX first") from error
    if not proto.ir_version or not proto.graph.node:
        raise ModelError(f"{path} is not an ONNX model (no graph in it), or it is truncated; export or copy it again")
    if not proto.opset_import:
        raise ModelError(f"{path} names no opset: it is truncated or damaged; export or copy it again")
    return proto


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: "onnx.protobuf.RepeatedCompositeFieldContainer[onnx.NodeProto]") -> Iterator[onnx.TensorProto]:  # type: ignore[name-defined]  # the container has no public type
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for graph in attribute.graphs:
                yield from _tensors(graph)


def _external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for tensor in _tensors(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor
    for function in proto.functions:
        for tensor in _node_tensors(function.node):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                yield tensor


def _external_entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    sizes: dict[str, int] = {}
    for tensor in _external_tensors(proto):
        entries = _external_entries(tensor)
        location = entries.get("location", "")
        if location not in sizes:
            sizes[location] = _external_file_size(folder, location, path, tensor.name)
        try:
            end = int(entries.get("offset", "0")) + int(entries.get("length", "0"))
        except ValueError as error:
            raise ModelError(
                f"{path.name}: tensor {tensor.name} has an unreadable offset or length in {location}; export it again"
            ) from error
        if end > sizes[location]:
            raise ModelError(
                f"{path.name}: tensor {tensor.name} ends at byte {end} of {location}, which has only {sizes[location]} "
                "bytes: the data file is truncated; copy it again"
            )


def _external_file_size(folder: Path, location: str, path: Path, tensor_name: str) -> int:
    if not location or Path(location).is_absolute() or not (folder / location).resolve().is_relative_to(folder):
        raise ModelError(
            f"{path.name}: the data of tensor {tensor_name} lies at {location!r}, outside the model's folder; mptqc "
            "reads external data only beside the model: put the data file there and save the model again"
        )
    file = folder / location
    if not file.is_file():
        raise ModelError(
            f"{path.name}: its weights are in the data file {location}, which is missing (tensor {tensor_name}); copy "
            "it beside the model"
        )
    return file.stat().st_size


def _map_external_data(model: ir.Model, path: Path) -> None:
    ir.external_data.set_base_dir(model.graph, path.parent.resolve())
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                # The array stays mapped to the file: nothing is copied, and the tensor serializes without the folder.
                value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.dtype, name=value.name)
