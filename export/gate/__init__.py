"""The parity gate: comparisons of an export with its checkpoint."""
