"""Calls a function that runs an engine in a process of its own, so that a crash is an error."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.host.parent_process import end_with_parent

# The child finds modules where this process does, and runs nothing of the caller's: multiprocessing's "spawn"
# would import the caller's script, and with it run the call that started the child.
_CHILD = """
import pickle, sys
try:
    sys.path[:], job = pickle.load(sys.stdin.buffer)
except EOFError:
    sys.exit()  # the parent has just ended
from gemma_edge.export.gate.engine_process import work
work(job)
"""


def run_isolated(path: Path, function: Callable[..., None], *args: Any) -> None:
    """Calls `function(path, *args)` in a process of its own, and raises here what it raises there.

    Args:
        function: of a module that the process can import.

    Raises:
        BundleError: the process died; `path` is the bundle's.
    """
    receiver, sender = os.pipe()
    with contextlib.ExitStack() as stack:
        answer, ours = (stack.enter_context(open(*end)) for end in ((receiver, "rb"), (sender, "wb")))
        with _interrupts_wait():  # which the process inherits: Ctrl-C is for this one to handle
            command = [sys.executable, "-P", "-c", _CHILD]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[sender])
            stack.callback(_end, process)
        ours.close()  # the process has the only other end: `answer` ends when it does
        assert process.stdin is not None
        job = pickle.dumps((os.getpid(), sender, function, path, *args))
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pickle.dump((sys.path, job), pipe)
        told = answer.read()
        if not told:
            raise _death(path, process.wait())
    error = pickle.loads(told)
    if error is not None:
        raise error


def work(job: bytes) -> None:
    """In the other process, which ends with its parent: sends what the function raises, or None."""
    parent, sender, function, *args = pickle.loads(job)
    end_with_parent(parent)
    raised = None
    try:
        function(*args)
    except Exception as error:
        raised = error
    with contextlib.suppress(BrokenPipeError), open(sender, "wb") as answer:  # the parent has just ended
        pickle.dump(raised, answer)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _death(path: Path, code: int | None) -> BundleError:
    """The error that tells how the process ended, by its exit code: negative for a signal."""
    got, remedy = "the engine's process died", "Is there enough memory?"
    if code == -signal.SIGILL:
        got += " of an illegal instruction"
        remedy = "This CPU lacks instructions that the engine needs; export another --format."
    elif code:
        got += f" (signal {-code})" if code < 0 else f" (exit code {code})"
    return BundleError(path, "engine", "a run to its end", got, remedy)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits until the block ends; a process that is started within never gets one."""
    came: list[int] = []  # through the mask as well: an engine's thread does not block SIGINT
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # before anything here can be interrupted
        if main:
            signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)
