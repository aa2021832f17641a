"""Other tools to compare with: models that they quantize, for stock ONNX Runtime, and OpenVINO's times."""

from peers.nncf_int8 import write_nncf_int8
from peers.openvino_times import OpenVino
from peers.ort_int8 import write_dynamic_int8, write_static_int8

__all__ = ["OpenVino", "write_dynamic_int8", "write_nncf_int8", "write_static_int8"]
