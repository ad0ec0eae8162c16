"""The machine's cores, and how the heap returns memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import cast


def release_free_memory() -> None:
    """Gives the heap's free pages back to the system: after a prefill they are tens of megabytes."""
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None on other systems, whose allocators return pages by themselves."""
    try:
        return cast(Callable[[int], int], ctypes.CDLL("libc.so.6").malloc_trim)
    except (OSError, AttributeError):
        return None


def physical_cores() -> int:
    """Cores that this process may use, hardware threads counted once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {tuple(_siblings(cpu)) for cpu in allowed}
    return max(1, min(len(allowed), len(siblings)))


def _siblings(cpu: int) -> Iterator[str]:
    try:
        with open(
            f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii"
        ) as file:
            yield file.read().strip()
    except OSError:
        yield str(cpu)
