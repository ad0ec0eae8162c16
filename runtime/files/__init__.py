"""Files: read within bounds, hashed, kept in the cache."""
