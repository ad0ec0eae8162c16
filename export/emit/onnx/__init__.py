"""The interpreter that writes ONNX graphs."""
