"""The architecture, written once against Ops."""
