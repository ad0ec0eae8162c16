"""A disk that fails, or a process that is killed, at one of the operations on files below a folder."""

from __future__ import annotations

import builtins
import io
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Audit events of what changes a folder; `open` counts where it may write.
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


class BreakingDisk:
    """Counts what is written to files below a folder; after `sound` writes and syncs, all others fail."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.count, self.sound, self.error = folder, 0, 1 << 60, 0
        self.sync, self.open = os.fsync, io.open
        monkeypatch.setattr(os, "fsync", lambda descriptor: (self.step(), self.sync(descriptor))[1])
        monkeypatch.setattr(io, "open", self.opened)
        monkeypatch.setattr(builtins, "open", self.opened)

    def step(self) -> None:
        self.count += 1
        if self.count > self.sound:
            raise OSError(self.error, os.strerror(self.error))

    def opened(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
        ours = not isinstance(file, int) and self.folder in Path(os.fsdecode(file)).parents
        if not ours or not set(mode) & set("wxa+"):
            return self.open(file, mode, buffering, *text, **options)
        raw = breaking(self.step, file, mode.replace("b", "").replace("t", ""))
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, *text, **options)


def breaking(step: Callable[[], None], file: Any, mode: str) -> io.FileIO:
    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            step()
            return super().write(data)

    return Raw(file, mode)


class KillingDisk(BreakingDisk):
    """Kills the process before its operation number `deadly`: a write, a sync, or a change of a folder.

    For a process of its own: what it hooks into stays.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, deadly: int) -> None:
        super().__init__(folder, monkeypatch)
        self.sound = deadly - 1
        for name in ("write", "pwrite", "sendfile", "ftruncate"):
            monkeypatch.setattr(os, name, self.stepping(getattr(os, name)))
        sys.addaudithook(self.audit)

    def step(self) -> None:
        self.count += 1
        if self.count > self.sound:
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (self.step(), function(*args))[1]

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            writes = isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes or self.folder not in Path(os.fsdecode(path)).parents:
                return
        elif event not in CHANGES:
            return
        self.step()


def kill_everywhere(
    folder: Path,
    prepare: Callable[[], object],
    act: Callable[[], object],
    least: int = 1,
    most: int = 1000,
) -> Iterator[int]:
    """Runs `prepare()`, then `act()` in a process that dies before its first operation on files below
    `folder`; then before its second; and so on. Yields after each kill, and last after a run that lived.

    Args:
        least: so many operations there must be.
        most: of more operations than these, the first and the last ones, and some between.
    """
    with mmap.mmap(-1, 8) as shared:
        prepare()
        assert _status(folder, act, 1 << 60, shared) == 0
        count = int.from_bytes(shared[:], "little")
        assert count >= least
        between = range(1, count, max(1, 3 * count // most))
        edge = most // 3
        for deadly in sorted({*range(1, count + 1)[:edge], *between, *range(1, count + 1)[-edge:]}):
            prepare()
            assert _status(folder, act, deadly, shared) == signal.SIGKILL, deadly
            yield deadly
        prepare()
        act()
        yield count + 1


def _status(folder: Path, act: Callable[[], object], deadly: int, shared: mmap.mmap) -> int:
    """How the process ended; it writes into `shared` how many operations it made."""
    if not (pid := os.fork()):
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            disk = KillingDisk(folder, pytest.MonkeyPatch(), deadly)
            act()
            shared[:] = disk.count.to_bytes(8, "little")
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]
