"""Engines behind one Decoder protocol."""
