# For mypy only: with it the folders linked here come before an installed gemma_edge.
