"""The interpreter that writes TFLite graphs."""
