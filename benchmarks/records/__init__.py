"""Records: measured results as data, and the files that keep them."""
