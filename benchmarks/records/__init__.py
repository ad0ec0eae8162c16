"""Results as data: what was measured, records of it, and where they are kept."""
