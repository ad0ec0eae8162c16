"""The interpreters that write ONNX graphs."""
