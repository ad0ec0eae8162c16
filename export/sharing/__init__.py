"""Shares bundles: the model card, and the upload to a model hub."""
