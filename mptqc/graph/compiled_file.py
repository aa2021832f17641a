"""Reading what `mptqc compile` wrote: the model, and the plan in its metadata."""

from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from mptqc.errors import ModelError
from mptqc.plan import PLAN_KEY, QuantPlan


def load_compiled(path: Path) -> tuple[ir.Model, QuantPlan]:
    """Read a compiled file and its plan, without the plan's arrays.

    Raises:
        ModelError: no such file, not ONNX, not compiled by mptqc, or by another version.
    """
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give the path of a compiled .onnx file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"{path} is not an ONNX model, or it is truncated; give a compiled .onnx file") from error
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent.resolve())
    return model, _plan_of(model, path)


def _plan_of(model: ir.Model, path: Path) -> QuantPlan:
    content = model.metadata_props.get(PLAN_KEY)
    if content is None:
        raise ModelError(
            f"{path} was not compiled by mptqc (its metadata has no {PLAN_KEY}); give the output of mptqc compile"
        )
    try:
        return QuantPlan.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise ModelError(
            f"{path} holds a plan that this version of mptqc cannot read (at {where}: {first['msg'].lower()}); compile "
            "the model again"
        ) from error
