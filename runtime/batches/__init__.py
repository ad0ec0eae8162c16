"""Many prompts: computed so that what they share is shared, read from and written to files."""
