"""The 8-bit models that onnxruntime.quantization makes, to compare with."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.quant_utils import QuantFormat, QuantType
from onnxruntime.quantization.quantize import quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from mptqc.data.samples import FloatImages, Samples

CALIBRATION_BATCH = 16


class SamplesReader(CalibrationDataReader):
    """Our samples in the form in which onnxruntime.quantization asks for them."""

    def __init__(self, samples: Samples, input_name: str) -> None:
        self._batches: Iterator[FloatImages] = samples.batches(CALIBRATION_BATCH)
        self._input_name = input_name

    def get_next(self) -> dict[Any, Any]:
        """Return the next batch as a feed; empty after the last, which ends the calibration."""
        batch = next(self._batches, None)
        return {} if batch is None else {self._input_name: batch}


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Errors only, for as long as it lasts: onnxruntime.quantization advises through the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def write_static_int8(model: Path, output: Path, samples: Samples, input_name: str) -> None:
    """Write ONNX Runtime's static QDQ model: uint8 activations, int8 weights per channel, ranges from `samples`."""
    with quiet_root_logger(), tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(model, prepared)
        quantize_static(
            prepared,
            output,
            SamplesReader(samples, input_name),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )


def write_dynamic_int8(model: Path, output: Path) -> None:
    """Write ONNX Runtime's dynamic model: int8 weights, the range of each activation found at run time."""
    with quiet_root_logger(), tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(model, prepared)
        quantize_dynamic(prepared, output, weight_type=QuantType.QInt8)
