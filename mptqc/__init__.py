"""mptqc: compile float ONNX vision transformers to low-bit integer models for ONNX Runtime."""

__version__ = "0.1.0"
