"""Export formats: how each is planned, emitted and written."""
