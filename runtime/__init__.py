"""Bundle to tokens: the light runtime."""
