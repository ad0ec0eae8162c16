"""The version, as in pyproject.toml."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("gemma-edge")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
