"""Checkpoints of published shapes with random weights."""
