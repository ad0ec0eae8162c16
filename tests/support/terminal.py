"""A program at a terminal of its own, driven by keys."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from support.processes import PATIENCE_S

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\x07")


class Terminal:
    """See the module; leaving its context kills the program."""

    def __init__(self, argv: Sequence[str], folder: Path, variables: Mapping[str, str]) -> None:
        self.shown, self._text = "", codecs.getincrementaldecoder("utf-8")("replace")
        self.pid, self.descriptor = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.execvpe(argv[0], argv, {**os.environ, "TERM": "xterm", **variables})

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read_to(self, pattern: str) -> str:
        """What is shown from now until the pattern is, without control sequences."""
        deadline, known = time.monotonic() + PATIENCE_S, ""
        while not (found := re.search(pattern, known := CONTROL.sub("", self.shown))):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {known!r}"
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.shown += self._text.decode(os.read(self.descriptor, 4096))
        self.shown = known[found.end() :]
        return known[: found.end()]

    def ended(self) -> int:
        """The exit code, once the program has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while not (waited := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline, "the program goes on"
            if select.select([self.descriptor], [], [], 0.05)[0]:
                try:
                    os.read(self.descriptor, 4096)
                except OSError:  # its end is closed
                    time.sleep(0.02)
        self.pid = 0
        return os.waitstatus_to_exitcode(waited[1])

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self.descriptor)
