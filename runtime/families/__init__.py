"""Model families: what a config.json of each says."""
