"""Gemma 3n: its tensors and its computation, written once against Ops."""
