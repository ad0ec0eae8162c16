"""Calls a function that runs an engine in a process of its own, so that a crash is an error."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.host.parent_process import end_with_parent


def run_isolated(path: Path, function: Callable[..., None], *args: Any) -> None:
    """Calls `function(path, *args)` in a process of its own, and raises here what it raises there.

    Raises:
        BundleError: the process died; `path` is the bundle's.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(os.getpid(), sender, function, path, *args))
    try:
        with _interrupts_wait():  # which the process inherits: Ctrl-C is for this one to handle
            process.start()
        sender.close()
        error = receiver.recv()
    except EOFError:
        process.join()
        raise _death(path, process.exitcode) from None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        receiver.close()
    if error is not None:
        raise error


def _death(path: Path, code: int | None) -> BundleError:
    """The error that tells how the process ended, by its exit code: negative for a signal."""
    got, remedy = "the engine's process died", "Is there enough memory?"
    if code == -signal.SIGILL:
        got += " of an illegal instruction"
        remedy = "This CPU lacks instructions that the engine needs; export another --format."
    elif code:
        got += f" (signal {-code})" if code < 0 else f" (exit code {code})"
    return BundleError(path, "engine", "a run to its end", got, remedy)


def _work(parent: int, sender: Connection, function: Callable[..., None], *args: Any) -> None:
    """In the other process, which ends with its parent: sends what the function raises, or None."""
    end_with_parent(parent)
    raised = None
    try:
        function(*args)
    except Exception as error:
        raised = error
    with contextlib.suppress(BrokenPipeError):  # the parent has just ended
        sender.send(raised)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits until the block ends; a process that is started within never gets one."""
    resource_tracker.ensure_running()  # it would end the waiting when the first process starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    came: list[int] = []  # by way of an engine's thread, which does not block SIGINT
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if came:
        signal.raise_signal(signal.SIGINT)
