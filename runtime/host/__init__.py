"""The machine around the process: memory, parents, network."""
