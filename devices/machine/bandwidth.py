"""The machine's stream-read bandwidth: the limit of a decode step.

Decoding reads every resident weight once a token. So bytes per token x tokens per second, divided by the
bandwidth of plain reading, is the share of the memory's speed that a kernel reaches on any machine, however
busy.

    python -m gemma_edge.devices.machine.bandwidth THREADS SECONDS

prints it as one JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from gemma_edge.devices.script import run_script
from gemma_edge.runtime.files.typed_json import FieldError, to_json

# Far above any cache (a server's share of L3 is some 32 MB), and small enough for a board with 2 GB.
BYTES_PER_THREAD = 512 * 2**20
MOST_BYTES = 2 * 2**30
MIN_SAMPLES = 5


@dataclass(frozen=True)
class Bandwidth:
    """GB/s (10^9 bytes) of every pass over the buffers, all threads together."""

    DERIVED: ClassVar = ("median_gb_s", "best_gb_s")

    threads: int
    buffer_bytes: int
    samples_gb_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples_gb_s or min(self.samples_gb_s) <= 0:
            raise FieldError("samples_gb_s", "speeds above 0", list(self.samples_gb_s))

    @property
    def median_gb_s(self) -> float:
        return round(statistics.median(self.samples_gb_s), 3)

    @property
    def best_gb_s(self) -> float:
        return round(max(self.samples_gb_s), 3)


def stream_read_bandwidth(
    threads: int = 2, seconds: float = 2.0, bytes_per_thread: int = BYTES_PER_THREAD
) -> Bandwidth:
    """Reads private buffers from `threads` threads at once, pass after pass, for about `seconds`.

    The buffers take at most 2 GiB together, and at most a quarter of what is available.
    """
    size = min(bytes_per_thread, MOST_BYTES // threads, _available_memory() // 4 // threads)
    barrier = threading.Barrier(threads)
    samples: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        # Each thread fills its own buffer, so that on NUMA machines the pages are near it. Ones and not
        # zeros: untouched zero pages would all be one page of the kernel's.
        buffers = list(pool.map(lambda _: np.ones(size, np.int8), range(threads)))
        deadline = time.monotonic() + seconds
        while len(samples) < MIN_SAMPLES or time.monotonic() < deadline:
            spans = list(pool.map(lambda buffer: _read(buffer, barrier), buffers))
            # From the first start to the last end: no moment with an idle thread is left out.
            elapsed = max(end for _, end in spans) - min(start for start, _ in spans)
            samples.append(threads * size / elapsed / 1e9)
    return Bandwidth(threads, size, tuple(round(sample, 3) for sample in samples))


def _read(buffer: npt.NDArray[np.int8], barrier: threading.Barrier) -> tuple[float, float]:
    barrier.wait()
    start = time.perf_counter()
    # max over int8 reads fastest of what NumPy offers without the GIL: it has a vector instruction on
    # x86 and ARM (int64 has not), compares a whole register of bytes at once, and keeps several
    # accumulators. On 2 threads of an EPYC (GB/s, best): int8 38, int32 36, BLAS dot 34, int64 sum, max
    # and xor 33, float32 sum 22 (pairwise: bound by arithmetic).
    buffer.max()
    return start, time.perf_counter()


def _available_memory() -> int:
    """MemAvailable in bytes; where /proc does not say, half of the machine's memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def bandwidth_argv(python: str, threads: int, seconds: float) -> list[str]:
    """The command line of a process, here or on a device, that prints a `Bandwidth`."""
    return [python, "-m", "gemma_edge.devices.machine.bandwidth", str(threads), str(seconds)]


def main() -> int:
    threads, seconds = int(sys.argv[1]), float(sys.argv[2])
    print(json.dumps(to_json(stream_read_bandwidth(max(1, threads), seconds))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
