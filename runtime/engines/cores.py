"""The machine's cores, and how the heap returns memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import cast

M_ARENA_MAX = -8  # of malloc.h


def release_free_memory() -> None:
    """Gives the heap's free pages back to the system: after a prefill they are tens of megabytes."""
    if trim := _glibc("malloc_trim"):
        trim(0)


def share_heap_arenas() -> None:
    """Lets threads to come share one heap beside the main thread's, for a process that makes many of them.

    glibc gives each thread a heap of its own, up to eight a core, and each keeps pages that the others lack.
    """
    if set_option := _glibc("mallopt"):
        set_option(M_ARENA_MAX, 2)


@cache
def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's; None on other systems, whose allocators return pages by themselves."""
    try:
        return cast(Callable[..., int], getattr(ctypes.CDLL("libc.so.6"), name))
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
