"""From a named torch model to a float ONNX file that mptqc compiles."""

from mptqc.export.timm_models import export_timm

__all__ = ["export_timm"]
