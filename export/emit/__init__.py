"""Interpreters of the description: one computes, two write graphs."""
