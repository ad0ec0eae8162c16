"""The version, in one place for code; `pyproject.toml` has the same."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("gemma-edge")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
