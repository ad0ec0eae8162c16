"""`RunFolder`: the files of one answer on a device: sent there, named as here, and gone after it.

ROOT/runs/NAME/cwd      where the program runs; files have the names here that they were given as
ROOT/runs/NAME/N        what was sent
"""

from __future__ import annotations

import os
import posixpath
import secrets
import shlex
from pathlib import Path
from types import TracebackType
from typing import Self

from gemma_edge.devices.push import FileDevice, push
from gemma_edge.runtime.errors import DeviceError

_STALE_DAYS = 2  # after which folders that a lost connection left are removed


class RunFolder:
    """A folder of a run; a context that removes it."""

    def __init__(self, device: FileDevice) -> None:
        self._device = device
        self._path = f"{device.root}/runs/{secrets.token_hex(6)}"
        self.cwd = f"{self._path}/cwd"
        self._names: dict[str, str] = {}  # there, by the absolute path here

    def __enter__(self) -> Self:
        runs = shlex.quote(f"{self._device.root}/runs")
        self._device.sh(
            f"mkdir -p {shlex.quote(self.cwd)} && "
            f"find {runs} -mindepth 1 -maxdepth 1 -mtime +{_STALE_DAYS} -exec rm -rf {{}} +"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            self._device.answer(f"rm -rf {shlex.quote(self._path)}")
        except DeviceError:
            if error is None:
                raise

    def send(self, path: str, name: str | None = None) -> str:
        """Sends a file; returns its name in `cwd`: as given, or its last part where that leads upwards.

        Args:
            name: another name for it there.

        Raises:
            UsageError: there is no such file.
            DeviceError: the device is gone, or full.
        """
        whole = os.path.abspath(path)
        if whole not in self._names:
            number = len(self._names) + 1
            sent = push(self._device, Path(whole), folder=f"{self._path}/{number}")
            name = name or os.path.normpath(path).replace(os.sep, "/")
            if posixpath.isabs(name) or name.startswith("../"):
                name = posixpath.basename(whole)
            if name in self._names.values():
                name = f"{number}/{name}"
            link = f"{self.cwd}/{name}"
            parent = shlex.quote(posixpath.dirname(link))
            self._device.sh(f"mkdir -p {parent} && ln -s {shlex.quote(sent)} {shlex.quote(link)}")
            self._names[whole] = name
        return self._names[whole]

    def write(self, name: str, data: bytes) -> str:
        """Writes a file beside `cwd`; returns its path there."""
        path = f"{self._path}/{name}"
        self._device.sh(f"cat >{shlex.quote(path)}", stdin=data)
        return path

    def fifo(self) -> str:
        """Makes a FIFO; returns its path there."""
        path = f"{self._path}/fifo"
        self._device.sh(f"mkfifo -m 600 {shlex.quote(path)}")
        return path

    def fetch(self, name: str, target: Path) -> None:
        """Copies a file of `cwd` to here."""
        self._device.pull(f"{self.cwd}/{name}", target)
