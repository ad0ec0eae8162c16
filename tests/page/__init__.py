"""The chat page of `gemma-edge serve`, in a real browser."""
