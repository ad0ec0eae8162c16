"""Measures bundles: speed, latency, memory, accuracy, and peers."""
