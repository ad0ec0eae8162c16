"""Environment variables that the command line reads; docs/environment.md says what they mean."""

MODEL = "GEMMA_EDGE_MODEL"
TRACEBACK = "GEMMA_EDGE_TRACEBACK"
LOG = "GEMMA_EDGE_LOG"
