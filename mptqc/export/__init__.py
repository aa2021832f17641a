"""From a named torch model to a float ONNX file that mptqc compiles."""

from mptqc.export.timm_models import export_timm
from mptqc.export.transformers_models import export_transformers

__all__ = ["export_timm", "export_transformers"]
