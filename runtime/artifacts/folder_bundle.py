"""A bundle in a folder: manifest.json names every other file with its size and SHA-256."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from gemma_edge.runtime.artifacts.artifact_formats import FOLDER_FORMATS
from gemma_edge.runtime.artifacts.manifest import (
    EXPORT_AGAIN,
    HASH_AT_OPEN,
    MANIFEST,
    FileRecord,
    Json,
    check_schema,
    choice,
    member,
)
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.files.file_digest import sha256
from gemma_edge.runtime.files.text_files import is_name, read_json


class Container(Protocol):
    """The files of a bundle, wherever they lie: in a folder, or within one file.

    Attributes:
        path: the folder or the file.
        manifest_path: names the manifest in errors.
        manifest: its values; `config`, `context`, `chunk`, `kv_cache` and `format` are among them.
        files: the record of each file by its name.
    """

    @property
    def path(self) -> Path: ...

    @property
    def manifest_path(self) -> Path: ...

    @property
    def manifest(self) -> Json: ...

    @property
    def files(self) -> dict[str, FileRecord]: ...

    def file(self, name: str) -> Path:
        """The path of a file that `files` lists. Raises BundleError for any other name."""

    def hash(self, name: str, progress: Callable[[int], None] | None) -> str:
        """The SHA-256 of a file's bytes; `progress` is given the bytes hashed since its last call."""


@dataclass(frozen=True)
class FolderBundle:
    """See `Container`."""

    path: Path
    manifest: Json
    files: dict[str, FileRecord]

    @classmethod
    def open(cls, path: Path) -> FolderBundle:
        """Reads the manifest, then checks that the folder holds its files. Other files are ignored.

        Raises:
            BundleError: a file is missing, short, altered, or outside the folder; or the manifest is
                malformed or of a newer schema.
        """
        where = path / MANIFEST
        manifest = _read_manifest(path, where)
        check_schema(where, manifest)
        manifest = {"format": FOLDER_FORMATS[0], **manifest}  # the first bundles did not say
        choice(where, manifest, "format", FOLDER_FORMATS)
        folder = cls(path, manifest, file_records(where, manifest))
        folder._check_files()
        return folder

    @property
    def manifest_path(self) -> Path:
        return self.path / MANIFEST

    def file(self, name: str) -> Path:
        if name not in self.files:
            raise BundleError(self.manifest_path, "files", name, "no such entry", EXPORT_AGAIN)
        return self.path / name

    def hash(self, name: str, progress: Callable[[int], None] | None) -> str:
        return sha256(self.path / name, progress)

    def _check_files(self) -> None:
        root = self.path.resolve()
        for name, record in self.files.items():
            file = self.path / name
            if not file.resolve().is_relative_to(root):
                raise BundleError(file, "path", "a file inside the bundle", str(file.resolve()), EXPORT_AGAIN)
            if not file.is_file():
                raise BundleError(
                    file, "file", f"{record.bytes} bytes", "no such file", "Copy the bundle again."
                )
            size = file.stat().st_size
            if size != record.bytes:
                raise BundleError(file, "size", f"{record.bytes} bytes", f"{size}", "Copy the bundle again.")
            if size <= HASH_AT_OPEN:
                check_hash(self, name)


def check_hash(container: Container, name: str, progress: Callable[[int], None] | None = None) -> None:
    """Raises BundleError unless a file has its recorded SHA-256."""
    digest, recorded = container.hash(name, progress), container.files[name].sha256
    if digest != recorded:
        remedy = "The file was altered: copy the bundle again."
        raise BundleError(container.path / name, "sha256", recorded, digest, remedy)


def _read_manifest(path: Path, manifest_path: Path) -> Json:
    if not is_name(str(path).lstrip("/") or "."):
        raise BundleError(path, "path", "a name in UTF-8, which engines take", "another", "Rename it.")
    if not path.is_dir():
        expected = f"a folder with a {MANIFEST}, or a .litertlm"
        raise BundleError(path, "bundle", expected, "no such file", "Make one with `gemma-edge export`.")
    if not manifest_path.exists():
        remedy = "Make a bundle with `gemma-edge export`."
        if (path / "config.json").exists():
            remedy = f"This is a checkpoint: `gemma-edge export {path} OUT` makes a bundle of it."
        elif (path / "adapter_config.json").exists():
            remedy = (
                f"This is an adapter: `gemma-edge export BASE OUT --adapter {path}` makes a bundle of both."
            )
        raise BundleError(manifest_path, "file", "a bundle's manifest", "no such file", remedy)
    return read_json(manifest_path, BundleError, remedy=EXPORT_AGAIN)


def file_records(manifest_path: Path, manifest: Json) -> dict[str, FileRecord]:
    """The files that a manifest lists, by names that stay inside a folder.

    Raises:
        BundleError: a name or a record is malformed.
    """
    records = {}
    for name, entry in member(manifest_path, manifest, "files", dict).items():
        posix = PurePosixPath(name)
        if (
            posix.is_absolute()
            or ".." in posix.parts
            or "\\" in name
            or str(posix) != name
            or name == "."
            or not is_name(name)
        ):
            raise BundleError(
                manifest_path, f"files[{name!r}]", "a path inside the bundle", repr(name), EXPORT_AGAIN
            )
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or size < 0 or not isinstance(digest, str):
            raise BundleError(
                manifest_path, f"files[{name!r}]", "bytes and sha256", repr(entry), EXPORT_AGAIN
            )
        records[name] = FileRecord(size, digest)
    return records
