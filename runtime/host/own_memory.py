"""Memory that this process takes."""

from __future__ import annotations

import os


def own_memory() -> tuple[int | None, int | None]:
    """Bytes of anonymous and of all resident memory; None where nobody tells (no Linux)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return None, None
    page = os.sysconf("SC_PAGE_SIZE")
    return (resident - shared) * page, resident * page
