"""Turn a torch module into an ONNX file with either of torch's two exporters."""

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from mptqc.errors import ModelError, OutputError
from mptqc.export.packages import import_torch

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

Exporter = Literal["dynamo", "torchscript"]
DEFAULT_OPSETS: Mapping[Exporter, int] = {"dynamo": 20, "torchscript": 17}
OPSET_RANGES: Mapping[Exporter, tuple[int, int]] = {"dynamo": (18, 25), "torchscript": (13, 20)}
INPUT_NAME, OUTPUT_NAME = "images", "logits"
DYNAMIC_BATCH_NAME = "batch"
TRACED_BATCH = 2  # a traced batch of 1 is taken for a constant by the exporters
# A protobuf message ends at 2 GiB; the graph around the weights takes the room below that.
EXTERNAL_DATA_FROM_BYTES = 2**31 - 64 * 2**20


@dataclass(frozen=True)
class OnnxForm:
    """Which ONNX is written: the exporter, the opset (None: that exporter's default), the batch (None: dynamic)."""

    exporter: Exporter = "dynamo"
    opset: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.exporter not in OPSET_RANGES:
            raise ModelError(f"unknown exporter {self.exporter!r}. Known exporters: {', '.join(OPSET_RANGES)}.")
        low, high = OPSET_RANGES[self.exporter]
        if not low <= self.resolved_opset <= high:
            raise ModelError(
                f"opset {self.opset} was asked for, but the {self.exporter} exporter writes opsets {low} to {high}."
            )
        if self.batch is not None and self.batch < 1:
            raise ModelError(f"batch is {self.batch}; give a positive number, or leave it out for a dynamic batch.")

    @property
    def resolved_opset(self) -> int:
        """The opset that is written."""
        return DEFAULT_OPSETS[self.exporter] if self.opset is None else self.opset


def export_module(
    module: "nn.Module", sample_shape: tuple[int, ...], output: Path, form: OnnxForm, metadata: Mapping[str, str]
) -> None:
    """Write `module` (one float32 input `images`, one output `logits`) to `output`, beside it first, then renamed.

    Args:
        module: the model; it is put in evaluation mode.
        sample_shape: the input's shape without the batch, such as (3, 224, 224).
        output: the ONNX file; weights too large for one protobuf go to `<output name>.data` beside it.
        form: exporter, opset and batch.
        metadata: entries for the model's `metadata_props`.

    Raises:
        ModelError: the exporter cannot translate the module.
        OutputError: `output` cannot be written.
    """
    torch = import_torch()
    generator = torch.Generator().manual_seed(0)
    batch = TRACED_BATCH if form.batch is None else form.batch
    sample = torch.randn((batch, *sample_shape), generator=generator)
    module.eval()
    with _staging_folder(output) as staging:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # notes on the exporters' own internals
                translate = _dynamo_model if form.exporter == "dynamo" else _torchscript_model
                model = translate(module, sample, form, Path(staging))
        except Exception as error:
            raise ModelError(
                f"torch's {form.exporter} exporter cannot translate {type(module).__name__} to opset "
                f"{form.resolved_opset}: {type(error).__name__}: {_first_line(error)} "
                f"Try --exporter {_other(form.exporter)}."
            ) from error
        model.metadata_props.update(metadata)
        _save(model, output, Path(staging))
    logger.info("wrote %s: %s, opset %d", output, form.exporter, form.resolved_opset)


def _dynamo_model(module: "nn.Module", sample: "Tensor", form: OnnxForm, _staging: Path) -> ir.Model:
    torch = import_torch()
    shapes = ({0: torch.export.Dim(DYNAMIC_BATCH_NAME)},) if form.batch is None else None
    program = torch.onnx.export(
        module,
        (sample,),
        dynamo=True,
        verbose=False,
        opset_version=form.resolved_opset,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_shapes=shapes,
    )
    model = program.model
    assert isinstance(model, ir.Model)
    for node in model.graph.all_nodes():
        # Stack traces of the exporting machine: they carry its paths and are most of a small file.
        node.metadata_props.clear()
    return model


def _torchscript_model(module: "nn.Module", sample: "Tensor", form: OnnxForm, staging: Path) -> ir.Model:
    torch = import_torch()
    axes = {INPUT_NAME: {0: DYNAMIC_BATCH_NAME}, OUTPUT_NAME: {0: DYNAMIC_BATCH_NAME}} if form.batch is None else None
    traced = staging / "traced.onnx"
    torch.onnx.export(
        module,
        (sample,),
        str(traced),
        dynamo=False,
        opset_version=form.resolved_opset,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_axes=axes,
    )
    return ir.load(traced)


def _save(model: ir.Model, output: Path, staging: Path) -> None:
    weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data_name = f"{output.name}.data" if weight_bytes > EXTERNAL_DATA_FROM_BYTES else None
    folder = staging / "finished"
    try:
        folder.mkdir()
        if data_name is None:
            ir.external_data.load_to_model(model)
        ir.save(model, folder / output.name, external_data=data_name)
        if data_name is not None:
            (folder / data_name).replace(output.with_name(data_name))
        (folder / output.name).replace(output)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error}. Check the folder's rights and free space.") from error


class _staging_folder:  # noqa: N801 - used as a function
    """A temporary folder beside `output`, so that the last step is a rename on one file system."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._folder: str | None = None

    def __enter__(self) -> str:
        try:
            self._folder = tempfile.mkdtemp(prefix=".mptqc-export-", dir=self._output.parent)
        except OSError as error:
            raise OutputError(
                f"{self._output} cannot be written: {error.strerror} ({self._output.parent}). "
                "Give a path in an existing folder that you may write to."
            ) from error
        if self._output.is_dir() or (self._output.exists() and not os.access(self._output, os.W_OK)):
            shutil.rmtree(self._folder)
            raise OutputError(f"{self._output} is a folder or write-protected; give the path of a file.")
        return self._folder

    def __exit__(self, *_: object) -> None:
        assert self._folder is not None
        shutil.rmtree(self._folder, ignore_errors=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") + ".") if lines else "no message."


def _other(exporter: Exporter) -> Exporter:
    return "torchscript" if exporter == "dynamo" else "dynamo"
