"""KV caches of earlier prompts: in the decoder, in memory, in files."""
