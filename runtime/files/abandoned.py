"""What a process that was killed has left behind: names that hold its process id, and temporary folders."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX, _SUFFIX = "gemma-edge-", ".temporary"


def abandoned(folder: Path, before: str, after: str = "") -> list[Path]:
    """The paths BEFORE + process id + AFTER in a folder whose process has ended."""
    found = []
    for path in folder.glob(f"{glob.escape(before)}*{glob.escape(after)}"):
        pid = path.name.removeprefix(before).removesuffix(after)
        if pid.isdecimal() and not _lives(int(pid)):
            found.append(path)
    return found


def remove_abandoned(folder: Path, before: str, after: str = "") -> None:
    """Removes the files and folders that `abandoned` finds; those that cannot be removed stay."""
    for path in abandoned(folder, before, after):
        remove(path)


def remove(path: Path) -> None:
    """Removes a file or a folder, as far as that is possible."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# Temporary folders. -------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_folder(purpose: str = "", parent: Path | None = None) -> Iterator[Path]:
    """A new folder in `parent`, by default $TMPDIR, removed when the block ends.

    Folders that killed processes have left in $TMPDIR are removed first.
    """
    path, owner = _owned_folder(purpose, parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(owner)


def folder_of_this_process(purpose: str = "") -> Path:
    """As `temporary_folder`, removed when this process ends."""
    path, _ = _owned_folder(purpose, None)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def remove_abandoned_folders() -> None:
    """Removes this user's temporary folders of ours that no process owns."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            folder = _locked(path)
            try:
                if os.fstat(folder).st_uid == os.geteuid():
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(folder)


def _owned_folder(purpose: str, parent: Path | None) -> tuple[Path, int]:
    """A folder, and the descriptor whose lock says that its process lives: the kernel takes it back."""
    remove_abandoned_folders()
    while True:
        path = Path(tempfile.mkdtemp(_SUFFIX, f"{_PREFIX}{purpose}-" if purpose else _PREFIX, parent))
        try:
            owner = _locked(path)
        except (BlockingIOError, FileNotFoundError):  # another process took it for abandoned
            continue
        except OSError:  # a file system without locks: there nobody takes it for abandoned
            owner = os.open(path, os.O_RDONLY)
        if path.exists():
            return path, owner
        os.close(owner)


def _locked(path: Path) -> int:
    """A locked descriptor of a folder. Raises OSError: BlockingIOError where a process holds the lock."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(folder)
        raise
    return folder
