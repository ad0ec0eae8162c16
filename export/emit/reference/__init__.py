"""The interpreter that computes, in NumPy: the truth."""
