"""The format "onnx": a folder for ONNX Runtime."""
