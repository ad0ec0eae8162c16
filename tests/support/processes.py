"""Waiting for other processes, and finding them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE_S = 300.0  # a net below every wait: how long a machine takes judges nothing


def wait_for(condition: Callable[[], object], otherwise: str) -> None:
    """Returns as soon as the condition holds; fails with `otherwise` if it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def limited(code: str, **limits: int) -> list[str]:
    """Arguments that run Python code within limits of setrlimit: `AS=` bytes, `CPU=` seconds, `FSIZE=` bytes.

    The new process sets them itself: between fork and exec a process with threads may hang.
    """
    limiting = "".join(f"resource.setrlimit(resource.RLIMIT_{n}, ({v}, {v}))\n" for n, v in limits.items())
    return [sys.executable, "-c", f"import resource\n{limiting}{code}"]


def sleeping(seconds: str) -> list[int]:
    """Processes `sleep SECONDS`."""
    found, wanted = [], f"sleep\0{seconds}\0".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "cmdline").read_bytes() == wanted:
                    found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    """Processes that a process started and that are still there."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def descendants(pid: int, name: str) -> Iterator[int]:
    """Processes below a process that have that name."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            yield from descendants(child, name)
            if Path(f"/proc/{child}/comm").read_text().strip() == name:
                yield child


def ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that only waits for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
