"""`gemma-edge serve` under load, and what it adds to the library's times."""
