"""Recipes, quantization, and weights streamed into files."""
