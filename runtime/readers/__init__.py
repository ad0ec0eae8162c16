"""Files that may come from anybody: every offset and length is checked before it is followed."""
