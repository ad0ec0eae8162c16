"""A folder for ONNX Runtime."""
