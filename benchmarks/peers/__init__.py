"""Peers: other programs measured on the same sizes."""
