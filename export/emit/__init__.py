"""What interprets the description."""
