"""The one caller of onnxsim."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence

import onnx
import onnxsim

from mptqc.errors import ModelError

logger = logging.getLogger(__name__)

_STDERR = 2

BATCHES = (2, 3, 5)
"""Numbers of images at which it is seen how a value depends on the batch."""


def fold_constants(proto: onnx.ModelProto, skipped_optimizers: Sequence[str] | None = None) -> onnx.ModelProto:
    """Return the model with constants folded and shapes inferred; the argument is not changed.

    Args:
        proto: a model of less than 2 GB.
        skipped_optimizers: run onnxsim's graph optimizers but for these; None runs none, so that every value that
            is left keeps its name.

    Raises:
        ModelError: the model is not valid ONNX.
    """
    optimize = skipped_optimizers is not None
    skipped = list(skipped_optimizers or ())
    try:
        onnx.checker.check_model(proto)
        with _native_messages_to_log():
            folded, _ = onnxsim.simplify(
                proto, perform_optimization=optimize, skipped_optimizers=skipped, tensor_size_threshold="1.5GB"
            )
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise ModelError(f"the model is not valid ONNX: {error}; export it again") from error
    assert isinstance(folded, onnx.ModelProto)
    return folded


def fold_at_batch(proto: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """`fold_constants` of a model whose first input has `batch` images, whatever its message says of other shapes."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)  # type: ignore[no-untyped-call]  # generated
    del fixed.graph.value_info[:]
    for output in fixed.graph.output:
        for dim in output.type.tensor_type.shape.dim:
            dim.Clear()  # type: ignore[no-untyped-call]  # generated
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    return fold_constants(fixed)


@contextlib.contextmanager
def _native_messages_to_log() -> Iterator[None]:
    """Log what native code writes to stderr: onnxsim warns of each op that it cannot fold in its first round."""
    with tempfile.TemporaryFile() as messages:
        saved = os.dup(_STDERR)
        os.dup2(messages.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(saved, _STDERR)
            os.close(saved)
            messages.seek(0)
            for line in messages.read().decode(errors="replace").splitlines():
                logger.debug("onnxsim: %s", line)
