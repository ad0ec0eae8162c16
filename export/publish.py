"""Publishing a bundle: written to a sibling folder, synced, renamed. Old, new or absent, never torn."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

from gemma_edge.export.replaced_bundle import carry_over
from gemma_edge.runtime.artifacts.bundle_list import is_litertlm, peek_manifest
from gemma_edge.runtime.artifacts.manifest import MANIFEST
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from gemma_edge.runtime.files.abandoned import abandoned, remove, remove_abandoned
from gemma_edge.runtime.files.file_digest import sha256

Json = dict[str, Any]
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2
ROOM = 64 << 20  # bytes left free on the disk beside what the bundle needs


class Output(Protocol):
    """What weights are streamed to: any binary file will do."""

    def write(self, data: Any, /) -> int: ...
    def tell(self) -> int: ...


class PatchableOutput(Output, Protocol):
    """One whose beginning may be written again."""

    def patch(self, offset: int, data: Any, /) -> None: ...


class HashingFile:
    """A binary file that hashes what is written to it, so that gigabytes are not read again.

    Unless it is patched: then they are.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by `close`
        self._digest = hashlib.sha256()
        self._patched = False
        self._position = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self._position += len(view)
        return len(view)

    def patch(self, offset: int, data: Any) -> None:
        """Replaces bytes that were written before."""
        self._file.seek(offset)
        self._file.write(data)
        self._file.seek(self._position)
        self._patched = True

    def tell(self) -> int:
        return self._position

    def close(self) -> Json:
        """Syncs and closes; returns the manifest's record of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = sha256(self._path) if self._patched else self._digest.hexdigest()
        return {"bytes": self._position, "sha256": digest}

    def abandon(self) -> None:
        """Closes; what a full disk did not take is dropped."""
        with contextlib.suppress(OSError):
            self._file.close()


class BundleWriter:
    """Collects the files of a bundle in a hidden sibling of `target`; `publish` makes them the bundle.

    Leaving the context without `publish`, by whatever error or Ctrl-C, removes the sibling. A target that is
    a symbolic link is followed. Files in an old bundle's folder that its manifest does not list are somebody
    else's: they stay. `scratch` is a second hidden sibling, for files that are no part of the bundle.

    Raises:
        UsageError: `target` exists and is not a bundle, so that nothing else is ever overwritten.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target)) if target.is_symlink() else target.absolute()
        if not self._replaceable():
            raise UsageError(f"{target} exists and is not a bundle; name another folder, or remove it")
        self.folder = self.target.with_name(f".{self.target.name}.partial-{os.getpid()}")
        self.scratch = self.folder.with_name(f".{self.target.name}.partial-scratch-{os.getpid()}")
        self.records: Json = {}
        self._open: list[HashingFile] = []

    def _replaceable(self) -> bool:
        """Whether the target is absent, empty or a bundle."""
        if not self.target.is_dir():
            return not self.target.exists()
        return not any(self.target.iterdir()) or (self.target / MANIFEST).is_file()

    def __enter__(self) -> Self:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self.target)
        self.folder.mkdir()
        self.scratch.mkdir()
        return self

    def check_room(self, needed: int) -> None:
        """Refuses to start what the disk cannot hold."""
        free = shutil.disk_usage(self.folder).free
        if free < needed + ROOM:
            raise GemmaEdgeError(
                f"{self.target.parent}: the bundle needs {needed + ROOM:,} bytes of disk, {free:,} are free; "
                "free some, or name a folder on another disk"
            )

    def write(self, name: str, produce: Callable[[HashingFile], Any]) -> Any:
        """Writes one file through `produce(file)` and records it; returns what `produce` returned."""
        file = HashingFile(self.folder / name)
        self._open.append(file)
        result = produce(file)
        self.records[name] = file.close()
        self._open.remove(file)
        return result

    def write_bytes(self, name: str, data: bytes) -> None:
        self.write(name, lambda file: file.write(data))

    def write_manifest(self, manifest: Json) -> None:
        """Writes the manifest, last: before it is there, the folder is no bundle."""
        path = self.folder / MANIFEST
        with open(path, "w", encoding="utf-8") as file:
            json.dump({**manifest, "files": self.records}, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> Path:
        """Renames the folder to the target; an old bundle there is replaced, or stays if that fails."""
        if self.target.is_dir():
            listed = (peek_manifest(self.target) or {}).get("files")
            ours = listed if isinstance(listed, dict) else self.records
            carry_over(self.target, self.folder, {MANIFEST, *ours})
        _sync_folder(self.folder)
        return self._replace_target(self.folder)

    def _replace_target(self, new: Path) -> Path:
        """Puts `new` in the target's place. The old bundle is then in the place of `new`, which `__exit__`
        removes.

        Where the file system cannot exchange two names, the old folder goes aside first: a kill between the
        two renames leaves it as `.NAME.old-PID`, and the next export to the same target puts it back.

        Raises:
            GemmaEdgeError: the old bundle is aside and could not be put back; the message says where it is.
        """
        if not self.target.exists() or self.target.is_file():
            os.replace(new, self.target)
        elif not exchange(new, self.target):
            old = self.target.with_name(f".{self.target.name}.old-{os.getpid()}")
            os.rename(self.target, old)
            try:
                os.rename(new, self.target)
            except BaseException as error:
                try:
                    os.rename(old, self.target)
                except OSError:
                    raise GemmaEdgeError(f"{self.target}: {error}; the old bundle is {old}") from error
                raise
            remove(old)
        _sync_folder(self.target.parent)
        return self.target

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open:
            file.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


class FileWriter(BundleWriter):
    """The same for a target that is one file; the hidden sibling is still a folder."""

    def _replaceable(self) -> bool:
        if not self.target.is_file():
            return not self.target.exists()
        return is_litertlm(self.target)

    def publish_file(self, path: Path) -> Path:
        """Renames a file of the folder to the target, as `publish` does with the folder."""
        return self._replace_target(path)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names at once; False where kernel, C library or file system cannot. Linux only."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done and (error := ctypes.get_errno()) not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        raise OSError(error, os.strerror(error), str(one), None, str(other))
    return not done


def _remove_abandoned(target: Path) -> None:
    """Removes what an export that was killed (not interrupted) has left beside `target`.

    Killed between its two renames, it has left the old bundle aside, which goes back to its place.
    """
    before = f".{target.name}."
    for old in abandoned(target.parent, f"{before}old-"):
        if target.exists():
            remove(old)
        else:
            os.rename(old, target)
    for kind in ("partial-", "partial-scratch-"):
        remove_abandoned(target.parent, before + kind)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
