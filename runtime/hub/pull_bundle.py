"""`pull_bundle`: a published bundle, fetched from a model hub.

The publisher is a stranger, so a bundle is bounded before it is fetched: only the files that the manifest
lists, under plain names with the suffixes of a bundle's files, of sizes that the manifest and the hub agree
on, if the disk has room. A hidden sibling of the target holds them until every hash is right and the bundle
opens; then it is renamed. An interrupted download goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gemma_edge.runtime.artifacts.artifact_formats import FOLDER_FORMATS
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.folder_bundle import file_records
from gemma_edge.runtime.artifacts.manifest import MANIFEST, FileRecord, Json, check_schema, choice
from gemma_edge.runtime.errors import BundleError, GemmaEdgeError, UsageError
from gemma_edge.runtime.files.text_files import MAX_TEXT_BYTES, parse_json
from gemma_edge.runtime.hub.hub_address import LITERTLM, PLAIN_NAME, HubAddress
from gemma_edge.runtime.hub.hub_reader import HubReader, Listing, TransientError, read
from gemma_edge.runtime.units import format_size

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
MAX_FILES = 64
SUFFIXES = frozenset((".onnx", ".data", ".bin", ".model", ".jinja", ".json", ".tflite"))
ROOM = 64 << 20  # bytes left free on the disk
BLOCK = 1 << 20
PAUSES_S = (0.5, 1, 2, 4, 8)  # before each try that follows one that brought nothing
NOT_USED = "Nothing of it is used."

Progress = Callable[[int, int], None]


class CheckpointThereError(UsageError):
    """The repository holds a checkpoint, which is exported, not pulled."""


@dataclass(frozen=True)
class Pulled:
    """A bundle that was fetched.

    Attributes:
        path: its folder or .litertlm.
        commit: the hub's hash of what was fetched: as a revision, it names these bytes for ever.
        fetched: bytes that came over the network.
        example: a prompt that the model answers well, if the manifest names one.
    """

    path: Path
    commit: str
    fetched: int
    example: str | None


def pull_bundle(
    address: str | HubAddress, folder: str | Path | None = None, *, progress: Progress | None = None
) -> Pulled:
    """Fetches a bundle.

    Args:
        address: `owner/name[/path][@revision]`, or the URL of such a page; see `HubAddress.parse`.
        folder: the bundle's folder or .litertlm to be; None for the name on the hub, in this folder.
        progress: is given the bytes that are there and those that there will be, as they come.

    Raises:
        UsageError: no such bundle, access is refused, or something else stands at `folder`.
        CheckpointThereError: the repository holds a checkpoint.
        BundleError: the manifest lists what no bundle has, or bytes are not what it says.
        GemmaEdgeError: the connection broke, or the disk has no room.
    """
    if isinstance(address, str):
        address = HubAddress.parse(address)
    target = Path(folder or address.name).expanduser().absolute()
    reader = HubReader(address)
    listing = reader.listing()
    if (file := _litertlm(address, listing)) is not None:
        if folder is None:
            target = target.with_name(PurePosixPath(file).name)
        return _Pull(reader, listing, target, progress).file(file)
    return _Pull(reader, listing, target, progress).folder()


def _litertlm(address: HubAddress, listing: Listing) -> str | None:
    """The .litertlm to fetch; None if the bundle is a folder."""
    manifest = address.within(MANIFEST)
    if not address.is_file and manifest in listing.sizes:
        return None
    below = f"{address.path}/" if address.path else ""
    found = [name for name in listing.sizes if name.endswith(LITERTLM) and name.startswith(below)]
    if address.is_file:
        found = [name for name in listing.sizes if name == address.path]
    if len(found) == 1:
        return found[0]
    bundles = [name.removesuffix(f"/{MANIFEST}") for name in listing.sizes if name.endswith(f"/{MANIFEST}")]
    if several := sorted(found + bundles)[:3]:
        raise UsageError(f"{address} holds several bundles: name one, such as {address.id}/{several[0]}")
    if listing.has_checkpoint():
        raise CheckpointThereError(
            f"{address} is a checkpoint, not a bundle: gemma-edge export {address.id} OUT makes one of it"
        )
    raise UsageError(f"{address} is not a bundle: it has neither a {MANIFEST} nor a {LITERTLM}")


class _Pull:
    """One download to `target`."""

    def __init__(self, reader: HubReader, listing: Listing, target: Path, progress: Progress | None) -> None:
        self._reader, self._listing, self._target, self._progress = reader, listing, target, progress
        self._address = reader.address
        self._partial = target.with_name(f".{target.name}.pulling")
        self._there = self._total = self._fetched = 0

    def folder(self) -> Pulled:
        """Fetches the bundle that a manifest describes."""
        text = self._small(MANIFEST, MAX_TEXT_BYTES)
        where = Path(str(self._address), MANIFEST)
        manifest = parse_json(text, where, BundleError, remedy=NOT_USED)
        records = self._records(where, manifest)
        if self._target.is_dir() and any(self._target.iterdir()):
            if not _holds(self._target / MANIFEST, text):
                raise self._occupied()
            return self._result(Bundle.open(self._target))
        if self._target.exists() and not self._target.is_dir():
            raise self._occupied()
        with self._working(records):
            for name, record in records.items():
                self._fetch(self._address.within(name), self._partial / name, record)
            _write(self._partial / MANIFEST, text)
            if self._listing.sizes.get(self._address.within(CARD), MAX_CARD_BYTES) < MAX_CARD_BYTES:
                _write(self._partial / CARD, self._small(CARD, MAX_CARD_BYTES))
            _remove_others(self._partial, {MANIFEST, CARD, *records})
            Bundle.open(self._partial)
            os.replace(self._partial, self._target)
        return self._result(Bundle.open(self._target))

    def file(self, name: str) -> Pulled:
        """Fetches a .litertlm, whose manifest and hashes lie inside."""
        record = FileRecord(self._listing.sizes[name], self._listing.hashes.get(name, ""))
        if self._target.exists():
            if self._target.is_file() and self._target.stat().st_size == record.bytes:
                bundle = Bundle.open(self._target)
                bundle.check_hashes()
                return self._result(bundle)
            raise self._occupied()
        with self._working({name: record}):
            path = self._partial / f"bundle{LITERTLM}"
            self._fetch(name, path, record)
            Bundle.open(path).check_hashes()
            os.replace(path, self._target)
            shutil.rmtree(self._partial, ignore_errors=True)
        return self._result(Bundle.open(self._target))

    def _result(self, bundle: Bundle) -> Pulled:
        example = bundle.manifest.get("example")
        return Pulled(
            self._target, self._listing.commit, self._fetched, example if isinstance(example, str) else None
        )

    def _occupied(self) -> UsageError:
        return UsageError(f"{self._target} is there and is not this bundle: name another, or remove it")

    def _small(self, name: str, limit: int) -> bytes:
        return self._reader.small_file(self._address.within(name), self._listing.commit, limit)

    def _records(self, where: Path, manifest: Json) -> dict[str, FileRecord]:
        """The files to fetch, each checked to be one that a bundle has, and of the size on the hub."""
        check_schema(where, manifest)
        choice(where, {"format": FOLDER_FORMATS[0], **manifest}, "format", FOLDER_FORMATS)
        records = file_records(where, manifest)
        if len(records) > MAX_FILES:
            raise BundleError(where, "files", f"at most {MAX_FILES} files", len(records), NOT_USED)
        for name, record in records.items():
            path = PurePosixPath(name)
            plain = all(PLAIN_NAME.fullmatch(part) for part in path.parts)
            if not plain or path.suffix not in SUFFIXES or name == MANIFEST:
                raise BundleError(where, "files", f"names in {', '.join(sorted(SUFFIXES))}", name, NOT_USED)
            size = self._listing.sizes.get(self._address.within(name))
            if size != record.bytes:
                got = "no such file" if size is None else f"{size:,}"
                raise BundleError(
                    where, f"files[{name!r}] on the hub", f"{record.bytes:,} bytes", got, NOT_USED
                )
        return records

    @contextmanager
    def _working(self, records: dict[str, FileRecord]) -> Iterator[None]:
        """The hidden sibling, for this process alone; it stays if the connection breaks, to go on from."""
        self._partial.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise UsageError(f"{self._target}: another process pulls to it: wait for its end") from None
        except OSError:  # a file system without locks
            pass
        try:
            self._total = sum(record.bytes for record in records.values())
            lying = sum(path.stat().st_size for path in self._partial.rglob("*") if path.is_file())
            free = shutil.disk_usage(self._partial).free
            if (needed := self._total - lying + ROOM) > free:
                raise GemmaEdgeError(
                    f"{self._target.parent}: the bundle needs {needed:,} more bytes of disk, {free:,} are "
                    "free; free some, or name a folder on another disk"
                )
            yield
        except BundleError:  # there is nothing to go on from
            shutil.rmtree(self._partial, ignore_errors=True)
            raise
        finally:
            os.close(folder)

    def _fetch(self, name: str, path: Path, record: FileRecord) -> None:
        """One file, from where an earlier download stopped; a beginning that proves wrong is dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        before = self._there
        for _ in range(2):
            self._there = before
            began = path.stat().st_size if path.exists() else 0
            digest = self._continue(name, path, record)
            if digest == record.sha256 or not record.sha256:
                return
            path.unlink()
            if not began:
                break
        raise BundleError(self._address.id, f"sha256 of {name}", record.sha256, digest, NOT_USED)

    def _continue(self, name: str, path: Path, record: FileRecord) -> str:
        """Fetches what is missing of a file; returns the SHA-256 of the whole."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(descriptor, "r+b") as file:
            digest = hashlib.sha256()
            if os.fstat(descriptor).st_size > record.bytes:
                file.truncate(0)
            while block := file.read(BLOCK):
                digest.update(block)
                self._tell(len(block))
            failures = 0
            while (position := file.tell()) < record.bytes:
                try:
                    with self._reader.open(name, self._listing.commit, position) as response:
                        if position and response.status != 206:  # the hub sends the whole file
                            self._tell(-position)
                            file.seek(0)
                            file.truncate()
                            digest = hashlib.sha256()
                        while block := read(response, min(BLOCK, record.bytes - file.tell())):
                            file.write(block)
                            digest.update(block)
                            self._fetched += len(block)
                            self._tell(len(block))
                    problem = "the hub's answer ended early"
                except TransientError as error:
                    problem = str(error)
                file.flush()
                failures = 0 if file.tell() > position else failures + 1
                if failures > len(PAUSES_S):
                    raise GemmaEdgeError(
                        f"{self._address}: stopped after {format_size(self._there)} of "
                        f"{format_size(self._total)}: {problem}. Give the same command again to go on"
                    )
                if failures:
                    time.sleep(PAUSES_S[failures - 1])
            os.fsync(descriptor)
            return digest.hexdigest()

    def _tell(self, change: int) -> None:
        self._there += change
        if self._progress:
            self._progress(self._there, self._total)


def _holds(path: Path, text: bytes) -> bool:
    try:
        return path.read_bytes() == text
    except OSError:
        return False


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove_others(folder: Path, names: set[str]) -> None:
    """Removes what a download of another revision has left."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()
