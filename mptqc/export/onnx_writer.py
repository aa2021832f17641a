"""Turn a torch module into an ONNX file with either of torch's two exporters."""

import logging
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from mptqc.errors import ModelError, OutputError
from mptqc.export.packages import import_torch
from mptqc.graph.io import save_model

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

Exporter = Literal["dynamo", "torchscript"]
DEFAULT_OPSETS: Mapping[Exporter, int] = {"dynamo": 20, "torchscript": 17}
OPSET_RANGES: Mapping[Exporter, tuple[int, int]] = {"dynamo": (18, 25), "torchscript": (13, 20)}
INPUT_NAME, OUTPUT_NAME = "images", "logits"
DYNAMIC_BATCH_NAME = "batch"
TRACED_BATCH = 2  # a traced batch of 1 is taken for a constant by the exporters


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
        output: the ONNX file; weights too large for one ONNX message go to a data file beside it.
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
    if not output.parent.is_dir():  # told before the long part
        raise OutputError(f"{output} cannot be written: the folder {output.parent} does not exist; create it first")
    with tempfile.TemporaryDirectory(prefix="mptqc-export-") as staging:
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
        save_model(model, output)
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") + ".") if lines else "no message."


def _other(exporter: Exporter) -> Exporter:
    return "torchscript" if exporter == "dynamo" else "dynamo"
