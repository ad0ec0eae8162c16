"""Results kept and shown: records, tables, plots, the page of `gemma-edge report`."""
