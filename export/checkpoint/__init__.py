"""Reads a checkpoint: shards, tensors by name, tokenizer, encoders."""
