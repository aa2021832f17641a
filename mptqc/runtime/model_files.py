"""The files that make up a model on disk."""

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from mptqc.errors import ModelError


def model_file_bytes(path: str | Path) -> int:
    """Return the size in bytes of an ONNX file and of every external data file it names, each counted once.

    Raises:
        ModelError: a file is missing, or `path` is not ONNX.
    """
    path = Path(path)
    files = {path, *external_data_files(path)}
    missing = sorted(str(file) for file in files if not file.is_file())
    if missing:
        raise ModelError(f"{path} needs files that do not exist: {', '.join(missing)}; keep them beside the model.")
    return sum(file.stat().st_size for file in files)


def external_data_files(path: Path) -> tuple[Path, ...]:
    """Return the external data files that an ONNX file names, in order of first use; their data is not read.

    Raises:
        ModelError: `path` is missing or not ONNX.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ModelError(f"{path} cannot be read as an ONNX file ({error}).") from error
    locations = (
        entry.value
        for tensor in _tensors(model.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    )
    return tuple(dict.fromkeys(path.parent / location for location in locations))


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)
