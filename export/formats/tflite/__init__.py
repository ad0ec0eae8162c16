"""The format "tflite": a folder for LiteRT."""
