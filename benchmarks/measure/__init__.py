"""The measuring harness: a session of measured processes, here or on a device."""
