"""Models that other tools quantize, to compare with; every function writes an ONNX file for stock ONNX Runtime."""

from peers.nncf_int8 import write_nncf_int8
from peers.ort_int8 import write_dynamic_int8, write_static_int8

__all__ = ["write_dynamic_int8", "write_nncf_int8", "write_static_int8"]
