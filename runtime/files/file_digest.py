"""SHA-256 of files, computed once for as long as a file stays as it is.

A digest is remembered in the cache folder beside the file's inode, size and times of change. The kernel sets
the time of the last change of the inode (ctime) at every write, and no program can set it back: a file that
was copied again, overwritten or flipped a bit in is hashed again. A digest of a file that changed less than
two seconds ago, the coarsest clock of a file system, is not remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from gemma_edge.runtime.files.abandoned import remove_abandoned
from gemma_edge.runtime.files.cache_folder import cache_folder

SETTLED_NS = 2_000_000_000
_NOTES = ".hashes"

Identity = tuple[int, int, int, int]


def sha256(
    path: Path, progress: Callable[[int], None] | None = None, begin: int = 0, end: int | None = None
) -> str:
    """The SHA-256 of bytes [begin, end) of a file, as hex; `end` None is the file's."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        left = file.seek(0, 2) - begin if end is None else end - begin
        file.seek(begin)
        while block := file.read(min(1 << 20, left)):
            left -= len(block)
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def remembered_sha256(path: Path, begin: int = 0, end: int | None = None) -> str:
    """As `sha256`, read from the cache folder if the file has not changed since it was hashed.

    Raises:
        OSError: the file cannot be read.
    """
    before = identity(path)
    if known := known_sha256(path, begin, end):
        return known
    digest = sha256(path, None, begin, end)
    if time.time_ns() - max(before[2:]) > SETTLED_NS:
        remember(path, digest, before, begin, end)
    return digest


def known_sha256(path: Path, begin: int = 0, end: int | None = None) -> str | None:
    """The digest that is remembered of a file as it is; None where none is."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads(note_of(path, begin, end).read_text(encoding="utf-8"))
        if tuple(said["identity"]) == identity(path) and isinstance(said["sha256"], str):
            return str(said["sha256"])
    return None


def remember(path: Path, digest: str, hashed: Identity, begin: int = 0, end: int | None = None) -> None:
    """Notes a digest, if the file is still the one that was hashed. A folder that takes no notes costs time
    only.
    """
    note = note_of(path, begin, end)
    written = note.with_name(f"{note.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        if identity(path) != hashed:
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(note.parent, f"{note.name}.")
        text = json.dumps({"path": str(path.absolute()), "identity": hashed, "sha256": digest})
        written.write_text(text, encoding="utf-8")
        os.replace(written, note)


def identity(path: Path) -> Identity:
    """Inode, size, and the times of the last change of content and of inode, in nanoseconds."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def note_of(path: Path, begin: int = 0, end: int | None = None) -> Path:
    """Where the digest of a file, or of a range of it, is remembered."""
    key = hashlib.sha256(f"{path.absolute()}\0{begin}\0{end}".encode(errors="surrogateescape"))
    return cache_folder() / _NOTES / key.hexdigest()[:32]


def forget_missing() -> None:
    """Removes the notes of files that are gone, and those that a kill has left half written."""
    notes = cache_folder() / _NOTES
    for note in notes.glob("*"):
        if note.suffix:
            remove_abandoned(notes, f"{note.stem}.")
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if not os.path.exists(json.loads(note.read_text(encoding="utf-8"))["path"]):
                note.unlink()
