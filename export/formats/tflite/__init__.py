"""A folder for LiteRT."""
