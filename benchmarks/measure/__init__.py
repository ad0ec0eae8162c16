"""One harness: a session of measured processes, here or on a device, and what each of them does."""
