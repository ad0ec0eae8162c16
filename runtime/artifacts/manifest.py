"""Values of a bundle's manifest, checked, and the record that it keeps of each file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.families.config_fields import MAX_SIZE

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
HASH_AT_OPEN = 16 << 20  # bytes of the largest file that is hashed whenever a bundle is opened
EXPORT_AGAIN = "Export the checkpoint again."

Json = dict[str, Any]


@dataclass(frozen=True)
class FileRecord:
    """The size and the SHA-256 of one file."""

    bytes: int
    sha256: str


def check_schema(path: Path, manifest: Json) -> None:
    """Raises BundleError unless this version of gemma-edge reads the manifest."""
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise BundleError(path, "schema_version", "an integer", repr(version), EXPORT_AGAIN)
    if version > SCHEMA_VERSION:
        raise BundleError(path, "schema_version", f"at most {SCHEMA_VERSION}", version, "Upgrade gemma-edge.")


def is_token_id(value: object) -> bool:
    """Is it an integer that a vocabulary can have, and neither true nor false?"""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def member(path: Path, manifest: Json, key: str, kind: type) -> Any:
    """The value of `key`, checked for its type; `path` names the manifest in errors."""
    value = manifest.get(key)
    if not isinstance(value, kind):
        raise BundleError(path, key, kind.__name__, repr(value)[:80], EXPORT_AGAIN)
    return value


def positive(path: Path, manifest: Json, key: str) -> int:
    """The value of `key`, checked to be a positive integer."""
    value = manifest.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BundleError(path, key, "a positive integer", repr(value), EXPORT_AGAIN)
    return value


def choice(path: Path, manifest: Json, key: str, choices: tuple[str, ...]) -> str:
    """The value of `key`, checked to be one of `choices`."""
    value = manifest.get(key)
    if value not in choices:
        raise BundleError(path, key, " or ".join(choices), repr(value), EXPORT_AGAIN)
    return str(value)
