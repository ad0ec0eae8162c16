"""One .litertlm file, for LiteRT-LM and for our runtime."""
