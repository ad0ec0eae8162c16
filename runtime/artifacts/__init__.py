"""Bundles and .litertlm files on disk, opened and checked before an engine sees a byte."""
