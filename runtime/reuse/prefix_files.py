"""`PrefixFiles`: KV snapshots of prompts' prefixes as files in the cache folder, for the next process.

A file's name says what it is of: the bundle and engine, then the keys of the tokens. So another bundle,
another engine and another picture miss. A file that is damaged is a miss too, and is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.runtime.engines.kv_snapshot import KvSnapshot
from gemma_edge.runtime.errors import FileError
from gemma_edge.runtime.files.cache_folder import cache_folder
from gemma_edge.runtime.files.file_digest import Identity, identity
from gemma_edge.runtime.files.kept_files import keep_cheap
from gemma_edge.runtime.files.sealed_arrays import read_header, read_sealed, write_sealed
from gemma_edge.runtime.reuse.kv_file import Keys, kv_header, kv_keys, kv_of
from gemma_edge.runtime.reuse.snapshot_pool import common_prefix, reusable

SUFFIX = ".prefix"
KIND = "prefix"
LEAST_TOKENS = 128  # that a file must spare: reading one costs as much as computing a few


@dataclass(frozen=True)
class _Entry:
    path: Path
    keys: Keys
    earliest: int


class PrefixFiles:
    """See the module.

    Args:
        of: the SHA-256 that names the bundle and its engine.
        limit: bytes that prefixes of all bundles take at most.
        least: tokens that a file must spare.
    """

    def __init__(self, of: str, limit: int, least: int = LEAST_TOKENS) -> None:
        self.of, self.limit, self.least = of, limit, least
        self._known: dict[Path, tuple[Identity, _Entry]] = {}

    def find(self, keys: Keys, beyond: int = 0) -> tuple[int, KvSnapshot | None]:
        """The snapshot that spares most of a prompt, and how many tokens; none unless that is `least` more
        than `beyond`.
        """
        found = [(reusable(entry.keys, entry.earliest, keys), entry) for entry in self._entries()]
        for tokens, entry in sorted(found, key=lambda pair: -pair[0]):
            if tokens < beyond + self.least:
                break
            if snapshot := self._read(entry):
                return tokens, snapshot
        return 0, None

    def branch(self, keys: Keys) -> int:
        """The most keys that a prompt shares with any file, whether or not that is of use."""
        return max((common_prefix(entry.keys, keys) for entry in self._entries()), default=0)

    def wants(self, keys: Keys) -> bool:
        """Whether a snapshot of these keys would spare `least` tokens more than the files that are there."""
        spared = (reusable(entry.keys, entry.earliest, keys) for entry in self._entries())
        return len(keys) - max(spared, default=0) >= self.least

    def store(self, keys: Keys, snapshot: KvSnapshot) -> None:
        """Writes a snapshot, if there is room for it."""
        digest = hashlib.sha256(",".join(map(str, keys)).encode()).hexdigest()
        header = {"kind": KIND, "of": self.of, "kv": kv_header(keys, snapshot)}
        keep_cheap(
            f"{self.of[:32]}-{digest[:32]}{SUFFIX}",
            self.limit,
            snapshot.bytes + (1 << 16),
            lambda path: write_sealed(path, header, snapshot.arrays),
        )

    def bytes_of(self, keys: Keys) -> int:
        """Bytes of the files that a prompt with these keys could begin with."""
        return sum(e.path.stat().st_size for e in self._entries() if reusable(e.keys, e.earliest, keys))

    def forget(self, keys: Keys) -> None:
        """Removes the files that a prompt with these keys could begin with."""
        for entry in list(self._entries()):
            if reusable(entry.keys, entry.earliest, keys):
                _remove(entry.path)

    def _entries(self) -> Iterator[_Entry]:
        """The readable files of this bundle and engine. Headers are read once for as long as a file stays."""
        before, self._known = self._known, {}
        for path in sorted(cache_folder().glob(f"{self.of[:32]}-*{SUFFIX}")):
            try:
                now = identity(path)
                if before.get(path, (None,))[0] != now:
                    header = read_header(path)
                    if header.get("of") != self.of:
                        raise FileError(path, "of", self.of, header.get("of"))
                    before[path] = now, _Entry(path, *kv_keys(header.get("kv"), path, FileError))
                self._known[path] = before[path]
                yield before[path][1]
            except FileError:
                _remove(path)
            except OSError:
                continue  # another process removed it

    def _read(self, entry: _Entry) -> KvSnapshot | None:
        try:
            header, arrays = read_sealed(entry.path)
            keys, snapshot = kv_of(header.get("kv"), arrays, entry.path, FileError)
        except (FileError, OSError, MemoryError):
            _remove(entry.path)
            return None
        with contextlib.suppress(OSError):
            os.utime(entry.path)  # used now
        return snapshot if keys == entry.keys else None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
