"""Which kernels this CPU gets: engines choose them by its instruction sets."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@cache
def cpu_fingerprint() -> str:
    """Eight hex digits that differ where architecture or instruction sets do, as after an SD card moved."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = {line for line in lines if line.split(":")[0].strip() in ("flags", "Features")}
    return hashlib.sha256("\n".join([platform.machine(), *sorted(flags)]).encode()).hexdigest()[:8]
