"""The format "litertlm": one file for LiteRT-LM and for our runtime."""
