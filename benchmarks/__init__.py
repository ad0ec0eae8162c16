"""Measures: memory, bandwidth, speed, peers."""
