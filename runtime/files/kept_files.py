"""Files that are costly to make and are kept in the cache folder: packed weights, .litertlm parts, KV caches.

A kept file's name begins with the SHA-256 of the content that it was made from. It also holds the SHA-256 of
the file's own content, and a file is used only while its content has it. Files are made under the folder's
lock, as NAME.building, and renamed when they are complete: whoever holds the lock may remove any `.building`
file, because its maker is dead. Readers take no lock: what they have mapped stays after it is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.runtime.files.cache_folder import cache_folder, cache_limit
from gemma_edge.runtime.files.file_digest import (
    forget_missing,
    identity,
    note_of,
    remember,
    remembered_sha256,
    sha256,
)

ROOM = 64 << 20  # bytes that stay free on the disk
_LOCK, _BUILDING = ".lock", ".building"
_DIGITS = 32  # of a SHA-256, in a file's name
# Earlier versions kept weights under the hash that a manifest claimed.
_UNPROVEN = re.compile(r"[0-9a-f]{32}-[0-9.]+\.xnnpack")
_in_use: set[Path] = set()  # by this process: never removed for the limit


@dataclass(frozen=True)
class KeptFile:
    """A kept file: bytes, and when it was last used, in seconds since the epoch."""

    path: Path
    bytes: int
    used: float


def kept(before: str, after: str, digest: str = "") -> Path | None:
    """The kept file BEFORE + digest + AFTER whose content still has that digest; None where there is none.

    Args:
        digest: the SHA-256 of the content; "" for any.
    """
    _sweep()
    wanted = digest[:_DIGITS] or "[0-9a-f]" * _DIGITS
    for path in sorted(cache_folder().glob(f"{before}{wanted}{after}")):
        with contextlib.suppress(OSError):
            if remembered_sha256(path).startswith(path.name[len(before) :][:_DIGITS]):
                with contextlib.suppress(OSError):  # no note, or not ours: then its own time says when
                    os.utime(note_of(path))
                _in_use.add(path)
                return path
        with contextlib.suppress(OSError):
            path.unlink()  # damaged
    return None


def keep(before: str, after: str, size: int, make: Callable[[Path], None], digest: str = "") -> Path:
    """The kept file BEFORE + digest + AFTER, made by `make(path)`; the digest is that of what `make` wrote.

    Another process that makes a file is waited for. Afterwards the least recently used files go, until the
    rest is within the limit; those of this process stay.

    Args:
        size: bytes that the file takes, about.
        digest: that of a file which another process may make meanwhile; "" for any.

    Raises:
        OSError: the folder cannot be written, or its disk is too full.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if found := kept(before, after, digest):
            return found
        _remove_unfinished(folder)
        prune(cache_limit() - size)
        free = shutil.disk_usage(folder).free
        if free < size + ROOM:
            raise OSError(errno.ENOSPC, f"{free:,} bytes are free, {size + ROOM:,} are needed", str(folder))
        building = folder / f"{before}{after}{_BUILDING}"
        try:
            make(building)
            with open(building, "rb") as file:
                os.fsync(file.fileno())
            made = sha256(building)
            path = folder / f"{before}{made[:_DIGITS]}{after}"
            os.replace(building, path)
        finally:
            building.unlink(missing_ok=True)
        remember(path, made, identity(path))
        _in_use.add(path)
        prune(cache_limit())
    return path


def keep_cheap(name: str, limit: int, size: int, make: Callable[[Path], None]) -> bool:
    """Keeps a file that is no great loss: not where another process holds the folder, nor on a full disk.

    Nor is it synced: whoever reads it checks it, after a power cut too. The least recently used files of its
    suffix give way to it, and no others.

    Args:
        limit: bytes that files of this suffix take at most.
        size: bytes that `make(path)` writes, about.
    """
    folder = cache_folder()
    path, building = folder / name, folder / f"{name}{_BUILDING}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, wait=False):
            _remove_unfinished(folder)
            others = sum(file.bytes for file in kept_files() if file.path.suffix != path.suffix)
            room = min(limit, cache_limit() - others) - size
            if room < 0 or shutil.disk_usage(folder).free < size + ROOM:
                return False
            prune(room, path.suffix)
            try:
                make(building)
                os.replace(building, path)
            finally:
                building.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def made_from(digest: str) -> list[Path]:
    """The kept files that were made from content with a SHA-256, or that are this content."""
    return sorted(cache_folder().glob(f"{digest[:_DIGITS]}-*"))


def kept_files() -> list[KeptFile]:
    """All kept files, the least recently used first."""
    found = []
    for path in cache_folder().glob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.name.startswith(".") and path.suffix != _BUILDING:
                note = note_of(path)
                used = (note if note.exists() else path).stat().st_mtime
                found.append(KeptFile(path, path.stat().st_size, used))
    return sorted(found, key=lambda file: file.used)


def prune(limit: int, suffix: str = "") -> int:
    """Removes the least recently used files until the rest takes at most `limit` bytes; returns the bytes
    removed.

    Args:
        suffix: of the files that count; "" for all.

    Files that this process uses stay. A file that another process has mapped stays on the disk until it ends.
    """
    files = [file for file in kept_files() if file.path.name.endswith(suffix)]
    total, removed = sum(file.bytes for file in files), 0
    for file in files:
        if total - removed <= limit:
            break
        if file.path not in _in_use:
            with contextlib.suppress(OSError):
                file.path.unlink()
                removed += file.bytes
    forget_missing()
    return removed


def clear() -> int:
    """Removes all kept files and unfinished ones, after a process that makes one has ended; returns the bytes
    removed.
    """
    folder = cache_folder()
    if not folder.is_dir():
        return 0
    with _locked(folder):
        removed = _remove_unfinished(folder)
        for file in kept_files():
            with contextlib.suppress(OSError):
                file.path.unlink()
                removed += file.bytes
        forget_missing()
    return removed


def _sweep() -> None:
    """Removes what a process that was killed has left, unless a process makes a file now."""
    folder = cache_folder()
    with contextlib.suppress(OSError):
        if any(folder.glob(f"*{_BUILDING}")):
            with _locked(folder, wait=False):
                _remove_unfinished(folder)


def _remove_unfinished(folder: Path) -> int:
    removed = 0
    for path in folder.glob("*"):
        if path.suffix == _BUILDING or _UNPROVEN.fullmatch(path.name):
            with contextlib.suppress(OSError):
                size = path.stat().st_size
                path.unlink()
                removed += size
    return removed


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Holds the folder's lock. Raises OSError, above all where it is held already and `wait` is False."""
    with open(folder / _LOCK, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
