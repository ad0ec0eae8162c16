"""Shows results: tables, plots, the page of `gemma-edge report`."""
