"""The interpreters that write TFLite graphs."""
