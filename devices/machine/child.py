"""Runs one measured program as a child process: bounded in time, sampled, never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gemma_edge.devices.machine.memory import PeakMemory, PeakSampler
from gemma_edge.devices.script import ERROR
from gemma_edge.runtime.errors import DeviceError, GemmaEdgeError
from gemma_edge.runtime.files.typed_json import from_json

T = TypeVar("T")
SIGNAL_BASE = 128  # exit code of a process that a signal ended, as shells report it


@dataclass(frozen=True)
class ChildRun:
    """How a child ended: its exit code (128 + n after signal n), output, seconds and memory."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float
    peak: PeakMemory

    def parse(self, kind: type[T], what: str) -> T:
        """The answer of a program that prints `kind` as JSON in the last line of its stdout.

        Raises:
            ChildError: the program failed; `what` names it.
            DeviceError: the program printed something else.
        """
        if self.exit_code:
            raise ChildError(what, self)
        try:
            return from_json(kind, json.loads(self.stdout.strip().rpartition("\n")[2]))
        except (ValueError, RecursionError) as error:
            raise DeviceError(f"{what} printed no report ({error}): {self.stdout[-200:]!r}") from None

    def last_line(self) -> str:
        """The last line of stderr; gemma-edge's own error if there is one, as engines log after it."""
        lines = self.stderr.strip().splitlines()
        ours = [line for line in lines if line.startswith(ERROR)]
        return (ours or lines)[-1] if lines else "(it said nothing on stderr)"


class ChildError(GemmaEdgeError):
    """A measured program failed; carries its exit code, so that the reason is not lost on the way up."""

    def __init__(self, what: str, run: ChildRun) -> None:
        super().__init__(f"{what} ended with exit code {run.exit_code}: {run.last_line()}")
        if 0 < run.exit_code < SIGNAL_BASE:
            self.exit_code = run.exit_code


def run_child(
    argv: Sequence[str],
    *,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    interval: float = 0.1,
    what: str | None = None,
) -> ChildRun:
    """Runs a program to its end, sampling its memory every `interval` seconds.

    Args:
        timeout: seconds after which the child's whole process group is killed.
        env: its complete environment; None inherits ours.
        what: its name in errors, argv[0] by default.

    Raises:
        DeviceError: it cannot be started, or did not finish in time.
    """
    what = what or argv[0]
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise DeviceError(f"{what} cannot be started: {error.strerror}") from None
    try:
        with PeakSampler(process.pid, interval) as sampler:
            stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        raise DeviceError(f"{what} did not finish within {timeout:g} s and was killed") from None
    except BaseException:  # Ctrl-C above all: the child has its own session and would outlive us
        _kill_group(process)
        raise
    code = process.returncode
    exit_code = code if code >= 0 else SIGNAL_BASE - code
    return ChildRun(exit_code, stdout, stderr, time.monotonic() - started, sampler.peak)


def _kill_group(process: subprocess.Popen[str]) -> None:
    # Before the leader is reaped its id cannot have been given to another group.
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
