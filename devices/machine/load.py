"""Measures the load of other processes: a comparison on a busy machine is not fair.

Threads that wait for each other by spinning (llama.cpp's OpenMP) lose many times over when one of them is
descheduled; threads that sleep lose little. So a busy machine moves ratios, and not only speeds.
"""

from __future__ import annotations

import time
from pathlib import Path

PROC_STAT = Path("/proc/stat")
QUIET_CORES = 0.25  # more than this is worth a warning


def busy_cores(seconds: float = 1.0) -> float | None:
    """Cores that other processes keep busy while this one sleeps; None without /proc/stat.

    Time stolen by the hypervisor for other guests counts as busy.
    """
    before = _busy_and_total()
    time.sleep(seconds)
    after = _busy_and_total()
    if before is None or after is None or after[1] <= before[1]:
        return None
    return round((after[0] - before[0]) / (after[1] - before[1]) * after[2], 2)


def _busy_and_total() -> tuple[int, int, int] | None:
    """Ticks busy, ticks in all, and the number of cores that they are summed over."""
    try:
        lines = PROC_STAT.read_text().splitlines()
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; guest times after them are part of user already.
    ticks = [int(value) for value in lines[0].split()[1:9]]
    cores = sum(line.startswith("cpu") for line in lines) - 1
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks), cores
