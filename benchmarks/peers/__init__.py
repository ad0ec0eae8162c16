"""Other programs on the same sizes."""
