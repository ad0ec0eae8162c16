"""`ShellDevice`: a device that is reached through a POSIX shell.

A subclass names the local program that runs a line in the device's shell, and explains that program's errors.
The exit code and the streams of that program are not trusted: every script ends with a line of its own that
gives its exit code. If this line is missing, the connection broke, and a `DeviceError` is raised.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import shlex
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from gemma_edge.devices.base import DeviceFacts, DeviceRun, Kind, MemoryPoint, Progress
from gemma_edge.devices.facts import parse_facts
from gemma_edge.devices.machine.memory import PeakMemory
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.host.offline import offline_variables

ANSWER_S = 30.0  # seconds that a short script may take, and that a transfer may stand still
PROBE_S = 120.0  # seconds that a busy board may take to tell of itself: it starts a Python
PULSE_S = 5.0  # seconds between two signs of life during a run
SILENCE_S = 30.0  # seconds without one after which the device ends the run by itself
LET_GO_S = 10.0  # seconds to clean up on a device that may be gone
_DONE = "gemma-edge-done:"
_NO_SPACE = "No space left on device"


@dataclass(frozen=True)
class Answer:
    """How a script on the device ended."""

    exit_code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode("utf-8", "replace")


class ShellDevice(ABC):
    """`Device` over a shell.

    Args:
        spec: as given to `open_device`.
        kind: which of them.
        root: the folder that is ours; `prepare` makes it.
    """

    def __init__(self, spec: str, kind: Kind, root: str) -> None:
        self._spec, self._kind, self.root = spec, kind, root
        self._has_taskset = False
        self._running: set[subprocess.Popen[bytes]] = set()

    @property
    def spec(self) -> str:
        return self._spec

    @property
    def kind(self) -> Kind:
        return self._kind

    # For subclasses.

    @abstractmethod
    def argv(self, line: str) -> list[str]:
        """The local program that runs a line in the device's shell, stdin and both streams connected."""

    def explain(self, said: str) -> str:
        """The meaning and the remedy of that program's last words when it fails."""
        return said or "the connection broke"

    # Scripts.

    def prepare(self) -> None:
        """Makes the folder and puts the supervisor into it.

        Raises:
            DeviceError: the device is not there, or has no room.
        """
        script = resources.files(__package__).joinpath("supervise.sh").read_bytes()
        made = (
            f"mkdir -p {shlex.quote(self.root)} && cd {shlex.quote(self.root)} && cat >supervise.sh && pwd -P"
        )
        self.root = self.sh(made, stdin=script).strip("\r\n")
        self._has_taskset = self.answer("command -v taskset").exit_code == 0

    def answer(self, script: str, *, stdin: bytes = b"", timeout: float = ANSWER_S) -> Answer:
        """Runs a short script in the device's shell, whatever its exit code is.

        Raises:
            DeviceError: the connection broke, or no end within `timeout` seconds.
        """
        try:
            done = subprocess.run(
                self.argv(_wrapped(script)),
                input=stdin,
                capture_output=True,
                timeout=timeout,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise self.error(f"no answer within {timeout:g} s") from None
        except OSError as error:
            raise self.error(
                f"{error.filename or 'its program'} cannot be started: {error.strerror}"
            ) from None
        return self._answer(done.stdout, done.stderr)

    def sh(self, script: str, *, stdin: bytes = b"", timeout: float = ANSWER_S) -> str:
        """The output of a short script.

        Raises:
            DeviceError: the script failed, or as `answer`.
        """
        return self.expect(self.answer(script, stdin=stdin, timeout=timeout)).text

    def expect(self, answer: Answer) -> Answer:
        """The answer, if the script succeeded.

        Raises:
            DeviceError: it did not; the message says if the disk is full.
        """
        if answer.exit_code == 0:
            return answer
        said = _last_line(answer.stderr)
        if _NO_SPACE in answer.stderr:
            raise self.no_space(said)
        raise self.error(said or f"a script ended with exit code {answer.exit_code}")

    def error(self, text: str) -> DeviceError:
        return DeviceError(f"{self._spec}: {text}")

    def no_space(self, said: str) -> DeviceError:
        return self.error(f"no space left in {self.root} ({said}). Remove files there.")

    def _answer(self, stdout: bytes, stderr: bytes) -> Answer:
        said, mark, code = stderr.decode("utf-8", "replace").rpartition(_DONE)
        # A login shell or the transport may print more after the code.
        digits = code.split(maxsplit=1)
        if not mark or not digits or not digits[0].isdigit():
            raise self.error(self.explain(_last_line(said + mark + code)))
        return Answer(int(digits[0]), stdout, said)

    # The protocol.

    @functools.cached_property
    def facts(self) -> DeviceFacts:
        return self.probe()

    def probe(self) -> DeviceFacts:
        script = resources.files(__package__).joinpath("probe.sh").read_text()
        here = f"cd {shlex.quote(self.root)}\nexec 2>/dev/null\n{script}\nexit 0"
        return parse_facts(self.sh(here, timeout=PROBE_S), spec=self._spec, kind=self._kind)

    def temperature(self) -> float | None:
        return self.probe().temperature_c

    @abstractmethod
    def push(self, source: Path, *, progress: Progress | None = None) -> str: ...

    @abstractmethod
    def pull(self, path: str, target: Path) -> None: ...

    def python(self) -> str:
        raise self.error("no Python there")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        yield

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        env: Mapping[str, str] | None = None,
        cores: Sequence[int] | None = None,
        interval: float = 0.25,
        what: str | None = None,
    ) -> DeviceRun:
        what = what or argv[0]
        bound = tuple(cores) if cores and self._has_taskset else None
        token = new_token()
        line = self.supervised(token, argv, timeout, env, bound, interval)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                self._supervise(line, timeout + ANSWER_S, what, out, err)
            except BaseException:  # Ctrl-C above all
                self.stop(token)
                raise
            out.seek(0)
            err.seek(0)
            stdout, stderr = (file.read().decode("utf-8", "replace") for file in (out, err))
        report = self.report(stderr, token, what, argv[0], timeout)
        return DeviceRun(
            report.exit_code,
            stdout,
            report.stderr,
            report.seconds,
            report.peak,
            samples=report.samples,
            cores=bound,
        )

    def supervised(
        self,
        token: str,
        argv: Sequence[str],
        timeout: float,
        env: Mapping[str, str] | None = None,
        cores: tuple[int, ...] | None = None,
        interval: float = 0.25,
    ) -> str:
        """The line that runs a program under the supervisor; see `Device.run` for the arguments."""
        variables = offline_variables() | dict(env or {})
        command = ["env", *(f"{key}={value}" for key, value in variables.items()), *argv]
        if cores:
            command = ["taskset", f"{sum(1 << core for core in set(cores)):x}", *command]
        limits = f"{round(timeout * 100)} {round(SILENCE_S * 100)} {interval:g}"
        words = f"run {token} {limits} {shlex.quote(argv[0])} {shlex.join(command)}"
        return f"cd {shlex.quote(self.root)} && exec sh ./supervise.sh {words}"

    def report(self, stderr: str, token: str, what: str, program: str, timeout: float) -> Report:
        """The supervisor's report of a program that ended by itself.

        Raises:
            DeviceError: it could not be started, took too long, or was lost.
        """
        report = Report.parse(stderr, token)
        if report is None:
            self.stop(token)
            raise self.error(f"{what} was lost: {self.explain(_last_line(stderr))}")
        if report.reason == "missing":
            raise self.error(f"{what} cannot be started: there is no {program}")
        if report.reason == "limit":
            raise self.error(f"{what} did not finish within {timeout:g} s and was killed")
        if report.reason != "exit":
            raise self.error(f"{what} was killed there: the device heard nothing from here any more")
        return report

    @contextlib.contextmanager
    def started(
        self, line: str, out: IO[bytes] | int, err: IO[bytes] | int
    ) -> Iterator[subprocess.Popen[bytes]]:
        """The local program that runs a line in the device's shell, ended with the block or by `close`."""
        try:
            process = subprocess.Popen(
                self.argv(line),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise self.error(
                f"{error.filename or 'its program'} cannot be started: {error.strerror}"
            ) from None
        self._running.add(process)
        with ending(process):
            try:
                yield process
            finally:
                self._running.discard(process)

    def _supervise(self, line: str, patience: float, what: str, out: IO[bytes], err: IO[bytes]) -> None:
        """Runs the supervisor there to its end, with a sign of life every few seconds."""
        deadline = time.monotonic() + patience
        with self.started(line, out, err) as process:
            assert process.stdin is not None  # for the type checker: it is a pipe
            while True:
                try:
                    process.wait(PULSE_S)
                    return
                except subprocess.TimeoutExpired:
                    pass
                if time.monotonic() > deadline:
                    raise self.error(f"{what} is overdue, and the device does not answer")
                with contextlib.suppress(BrokenPipeError):  # it has just ended
                    process.stdin.write(b"\n")
                    process.stdin.flush()

    def signal(self, token: str, name: str) -> None:
        """Sends a signal, such as INT, to the processes of a run."""
        self.answer(
            f"cd {shlex.quote(self.root)} && sh ./supervise.sh signal {token} {name}", timeout=LET_GO_S
        )

    def stop(self, token: str) -> None:
        """Ends a run whose connection is gone. The device also does so by itself, a little later."""
        with contextlib.suppress(DeviceError, KeyboardInterrupt):
            script = f"cd {shlex.quote(self.root)} && sh ./supervise.sh stop {token}"
            self.answer(script, timeout=LET_GO_S)

    def close(self) -> None:
        # Called from another thread too. Programs there end when the connection does.
        for process in tuple(self._running):
            process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    # Streams, for push and pull.

    def send(
        self, script: str, source: IO[bytes], sent: Callable[[int], None], patience: float = ANSWER_S
    ) -> Answer:
        """Runs a script with a file's rest on its stdin.

        Args:
            sent: called with the size of each piece that was sent.
            patience: seconds that the script may take after the last piece.

        Raises:
            DeviceError: the connection broke, or nothing moved for `ANSWER_S` seconds.
        """
        with self._streaming(script, stdin=subprocess.PIPE) as (process, watchdog, err):
            assert process.stdin is not None  # for the type checker: it is a pipe
            # A broken pipe: the script ended early, and says why.
            with contextlib.suppress(BrokenPipeError):
                while piece := source.read(1 << 20):
                    left = memoryview(piece)
                    while left:  # a signal may cut a write short
                        left = left[process.stdin.write(left) :]
                    watchdog.moved()
                    sent(len(piece))
                process.stdin.close()
            watchdog.stop()
            process.wait(patience)
            err.seek(0)
            return self._answer(b"", err.read())

    def receive(self, script: str, target: IO[bytes]) -> Answer:
        """Runs a script and writes its stdout to a file; raises as `send`."""
        with self._streaming(script, stdin=subprocess.DEVNULL) as (process, watchdog, err):
            assert process.stdout is not None  # for the type checker: it is a pipe
            while piece := process.stdout.read(1 << 20):
                target.write(piece)
                watchdog.moved()
            process.wait(ANSWER_S)
            err.seek(0)
            return self._answer(b"", err.read())

    @contextlib.contextmanager
    def _streaming(
        self, script: str, stdin: int
    ) -> Iterator[tuple[subprocess.Popen[bytes], _Watchdog, IO[bytes]]]:
        """A script's process, the watchdog that kills it when no bytes move, and its stderr."""
        stdout = subprocess.DEVNULL if stdin == subprocess.PIPE else subprocess.PIPE
        with tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                self.argv(_wrapped(script)),
                stdin=stdin,
                stdout=stdout,
                stderr=err,
                bufsize=0,
                start_new_session=True,
            )
            watchdog = _Watchdog(process)
            try:
                with ending(process):
                    yield process, watchdog, err
            except subprocess.TimeoutExpired:
                raise self.error(f"a transfer stood still for {ANSWER_S:g} s") from None
            finally:
                watchdog.stop()
            if watchdog.bit:
                raise self.error(f"a transfer stood still for {ANSWER_S:g} s")


class _Watchdog:
    """Kills a process when `moved` was not called for `ANSWER_S` seconds: no write blocks for ever."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.bit = False
        self._process, self._last, self._over = process, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="transfer-watchdog", daemon=True)
        self._thread.start()

    def moved(self) -> None:
        self._last = time.monotonic()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            if time.monotonic() - self._last > ANSWER_S:
                self.bit = True
                self._process.kill()
                return


@dataclass(frozen=True)
class Report:
    """The last lines of supervise.sh."""

    reason: str
    exit_code: int
    seconds: float
    stderr: str
    samples: tuple[MemoryPoint, ...]
    peak: PeakMemory

    @classmethod
    def parse(cls, text: str, token: str) -> Report | None:
        """None when its last line is missing."""
        stderr, _, tail = text.partition(f"\n{token} over\n")
        lines = [line.split() for line in (tail or text).splitlines() if line.startswith(f"{token} ")]
        if not lines or lines[-1][1] != "end" or len(lines[-1]) != 6:
            return None
        _, _, reason, code, started, ended = lines[-1]
        samples, peak = [], PeakMemory()
        for line in lines:
            # A full disk may have cut one short.
            if line[1] == "sample" and len(line) == 7:
                anon, file, shmem, high = (int(kilobytes) * 1024 for kilobytes in line[3:])
                rss = anon + file + shmem
                seconds = float(line[2]) - int(started) / 100
                samples.append(MemoryPoint(max(0.0, round(seconds, 2)), anon, file, rss))
                peak.rss_anon, peak.rss_file = max(peak.rss_anon, anon), max(peak.rss_file, file)
                peak.rss, peak.high_water = max(peak.rss, rss), max(peak.high_water, high)
                peak.samples += 1
        seconds = (int(ended) - int(started)) / 100
        return cls(reason, int(code), seconds, stderr, tuple(samples), peak)


@contextlib.contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends a process when the block ends: closes its stdin, waits, then kills."""
    try:
        yield
    finally:
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        try:
            if process.poll() is None:
                process.wait(LET_GO_S / 5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def new_token() -> str:
    """Names a run, in the environment of all its processes."""
    return f"ge{secrets.token_hex(8)}"


def _wrapped(script: str) -> str:
    """A line for any login shell: runs the script in a POSIX shell, then prints its exit code."""
    return f"exec sh -c {shlex.quote(f'({script}{chr(10)}); echo {_DONE}$? >&2')}"


def _last_line(text: str) -> str:
    lines = [line for line in text.replace("\r", "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
