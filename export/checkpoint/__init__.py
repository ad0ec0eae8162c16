"""A checkpoint as it is stored: shards, tensors by name, tokenizer, encoders."""
