"""Conversations with a model: turns, files of them, and the tools that a model calls."""
