"""This machine as a device: the same supervisor, and no files to send."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from gemma_edge.devices.base import Progress
from gemma_edge.devices.shell import ShellDevice
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.cache_folder import cache_folder


class LocalDevice(ShellDevice):
    """`local`. Pushed files stay where they are, and `python()` is the interpreter that runs this."""

    def __init__(self) -> None:
        if not os.path.exists("/proc/uptime"):
            raise DeviceError("local: this system has no /proc; measure on Linux, or over ssh or adb")
        super().__init__("local", "local", str(cache_folder() / "device"))
        self.prepare()

    def argv(self, line: str) -> list[str]:
        return ["sh", "-c", line]

    def push(self, source: Path, *, progress: Progress | None = None) -> str:
        if not source.exists():
            raise UsageError(f"{source}: no such file or folder")
        return str(source.absolute())

    def pull(self, path: str, target: Path) -> None:
        try:
            shutil.copyfile(path, target)
        except OSError as error:
            raise self.error(f"{path} cannot be copied: {error.strerror}") from None

    def python(self) -> str:
        return sys.executable
