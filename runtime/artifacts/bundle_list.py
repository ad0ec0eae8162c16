"""Finds bundles below a folder, and tells them apart by their manifests alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS, FILE_SUFFIXES, FOLDER_FORMATS
from gemma_edge.runtime.artifacts.litertlm_bundle import FORMAT, MANIFEST_KEY
from gemma_edge.runtime.artifacts.litertlm_reader import MAGIC, read_litertlm
from gemma_edge.runtime.artifacts.manifest import MANIFEST
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.files.text_files import parse_json, read_json

Json = dict[str, Any]
UNKNOWN = "?"


@dataclass(frozen=True)
class ListedBundle:
    """What a manifest says of its bundle; "?" and None for what it does not. Nothing of it is checked."""

    path: Path
    format: str
    recipe: str
    context: int | None
    bytes: int
    source: str

    def to_dict(self) -> Json:
        return {**asdict(self), "path": str(self.path)}


def find_bundles(folder: Path) -> Iterator[ListedBundle]:
    """The bundles in `folder` and below it, by their paths; those in hidden folders are left out."""
    if (folder / MANIFEST).is_file() and (manifest := peek_manifest(folder)) is not None:
        yield _listed(folder, manifest)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from find_bundles(path)
        elif path.suffix in FILE_SUFFIXES and (manifest := peek_manifest(path)):
            yield _listed(path, manifest)


def peek_manifest(path: Path) -> Json | None:
    """The manifest of the bundle at `path`; {} if none can be read, None if there is no bundle.

    No other file of the bundle is looked at.
    """
    try:
        if path.is_dir():
            manifest = path / MANIFEST
            return read_json(manifest, BundleError) if manifest.is_file() else None
        if not path.is_file() or not is_litertlm(path):
            return None
        return parse_json(read_litertlm(path).system.get(MANIFEST_KEY, "{}"), path, BundleError)
    except BundleError:
        return {}


def is_litertlm(path: Path) -> bool:
    """Whether a file begins as a .litertlm does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _listed(path: Path, manifest: Json) -> ListedBundle:
    def text(*keys: str) -> str:
        value: Any = manifest
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, str) else UNKNOWN

    plan, files = manifest.get("plan"), manifest.get("files")
    context = manifest.get("context", plan.get("context") if isinstance(plan, dict) else None)
    records = files.values() if isinstance(files, dict) else ()
    sizes = [record.get("bytes") for record in records if isinstance(record, dict)]
    format = FORMAT if path.is_file() else manifest.get("format", FOLDER_FORMATS[0])
    return ListedBundle(
        path,
        format if isinstance(format, str) and format in ARTIFACT_FORMATS else UNKNOWN,
        text("recipe", "name"),
        context if isinstance(context, int) else None,
        path.stat().st_size if path.is_file() else sum(size for size in sizes if isinstance(size, int)),
        text("source", "name"),
    )
