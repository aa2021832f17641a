"""onnx_ir in, onnx_ir out: reading, finding, naming and editing; nothing here runs a model."""
