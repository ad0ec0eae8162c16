"""Engines behind one Decoder protocol: ONNX Runtime and LiteRT."""
