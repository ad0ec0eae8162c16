"""The reference interpreters, which compute in NumPy: the truth."""
