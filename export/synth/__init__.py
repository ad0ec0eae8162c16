"""Checkpoints of true shapes with random weights."""
