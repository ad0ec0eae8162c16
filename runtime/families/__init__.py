"""Model families: the config of each, read from config.json."""
