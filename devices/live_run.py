"""`LiveRun`: a program on a device whose output is read while it runs, and that may be talked to.

    with LiveRun(device, [python, "-m", "gemma_edge", "run", "-"], what="run") as live:
        for piece in live.pieces():
            ...
    code = live.exit_code

The supervisor watches it as it watches a measured program: it ends, with all that it started, when this end
lets go, dies or falls silent.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, Self

from gemma_edge.devices.base import signal_name
from gemma_edge.devices.machine.child import SIGNAL_BASE
from gemma_edge.devices.shell import PULSE_S, ShellDevice, new_token
from gemma_edge.runtime.errors import DeviceError

LONGEST_S = 7 * 86_400.0
ENDING_S = 10.0  # seconds that a program has to clean up before it is killed
_PIECE = 1 << 16
# $1: the folder to run in, $2: what stdin is, then the program.
_IN_FOLDER = 'cd "$1" && in=$2 && shift 2 && exec "$@" <"$in"'


class LiveRun:
    """One run; a context, whose end leaves nothing running there.

    Args:
        argv: the program there.
        folder: where it runs; our folder by default.
        stdin: a file there that it reads; a FIFO that `feed` writes to.
        env: variables beside those that the device sets.
        on_error_line: told every line of its stderr, in a thread of its own.
        what: its name in errors.
    """

    def __init__(
        self,
        device: ShellDevice,
        argv: Sequence[str],
        *,
        folder: str | None = None,
        stdin: str = "/dev/null",
        env: Mapping[str, str] | None = None,
        on_error_line: Callable[[str], None] = lambda line: None,
        what: str = "the program",
    ) -> None:
        self._device, self._what, self._program = device, what, argv[0]
        self._on_error_line, self._token = on_error_line, new_token()
        command = ["sh", "-c", _IN_FOLDER, "sh", folder or device.root, stdin, *argv]
        self._line = device.supervised(self._token, command, LONGEST_S, env, interval=5)
        self._stack, self._over = contextlib.ExitStack(), threading.Event()
        self._said: list[str] = []  # the supervisor's own lines
        self._last_words = ""
        self.exit_code: int | None = None

    def __enter__(self) -> Self:
        pipes = (subprocess.PIPE, subprocess.PIPE)
        self._process = self._stack.enter_context(self._device.started(self._line, *pipes))
        work = (self._pulse, self._errors)
        self._threads = [threading.Thread(target=each, name="live-run", daemon=True) for each in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            if self.exit_code is None and not isinstance(error, DeviceError):
                self._end_early()
        finally:
            self._over.set()
            self._stack.close()
            for thread in self._threads:
                thread.join(ENDING_S)

    def pieces(self) -> Iterator[bytes]:
        """What the program prints, as it comes; at its end, `exit_code` is set.

        Raises:
            DeviceError: a signal ended the program, or the device is gone.
        """
        assert self._process.stdout is not None  # for the type checker: it is a pipe
        while piece := self._process.stdout.read(_PIECE):
            yield piece
        self._finish()

    def signal(self, name: str) -> None:
        """Sends a signal, such as INT, to the program."""
        self._device.signal(self._token, name)

    @contextlib.contextmanager
    def feed(self, fifo: str) -> Iterator[IO[bytes]]:
        """A stream here whose bytes go into a FIFO there, as they are written; its end is the FIFO's."""
        # The token in its environment: the supervisor ends it, too, where the program never opens the FIFO.
        # `signal`, however, means the program alone.
        copy = 'trap "" INT; exec cat >"$0"'
        line = f"GEMMA_EDGE_RUN={self._token} exec sh -c {shlex.quote(copy)} {shlex.quote(fifo)}"
        line = f"exec sh -c {shlex.quote(line)}"
        with self._device.started(line, subprocess.DEVNULL, subprocess.DEVNULL) as process:
            assert process.stdin is not None  # for the type checker: it is a pipe
            yield process.stdin

    def _finish(self) -> None:
        self._process.wait()
        self._over.set()
        self._threads[1].join(ENDING_S)
        text = "\n".join(["", *self._said]) if self._said else self._last_words
        report = self._device.report(text, self._token, self._what, self._program, LONGEST_S)
        self.exit_code = report.exit_code
        if report.exit_code - SIGNAL_BASE == 9:
            raise self._device.error(f"{self._what} was ended by {signal_name(report.exit_code)}")

    def _end_early(self) -> None:
        """Lets the program clean up, then kills what is left of it."""
        with contextlib.suppress(DeviceError, KeyboardInterrupt):
            self.signal("TERM")
            deadline = time.monotonic() + ENDING_S
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        if self._process.poll() is None:
            self._device.stop(self._token)

    def _pulse(self) -> None:
        assert self._process.stdin is not None  # for the type checker: it is a pipe
        while not self._over.wait(PULSE_S):
            with contextlib.suppress(OSError, ValueError):  # it has just ended
                self._process.stdin.write(b"\n")

    def _errors(self) -> None:
        assert self._process.stderr is not None  # for the type checker: it is a pipe
        held = ""  # the supervisor begins with an empty line
        rest = b""
        while piece := self._process.stderr.read(_PIECE):
            *lines, rest = (rest + piece).split(b"\n")
            for line in (each.decode("utf-8", "replace") for each in lines):
                if line.startswith(f"{self._token} "):
                    self._said.append(line)
                    held = ""
                    continue
                if held:
                    self._on_error_line("")
                held = "" if line else "\n"
                if line:
                    self._last_words = line
                    self._on_error_line(line)
        if last := rest.decode("utf-8", "replace"):
            self._last_words = last
