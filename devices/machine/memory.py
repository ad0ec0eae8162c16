"""The memory of a process, from /proc, and a cold page cache.

Three numbers, because they cost a device different things: RssAnon must stay in RAM (weights copied to
the heap, KV cache, activations), RssFile can be dropped and read again from flash (mapped weights), and
Pss divides shared pages among the processes that share them. Linux and Android only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import numpy as np

from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.files.typed_json import FieldError
from gemma_edge.runtime.host.process_memory import resident_memory

PROC = Path("/proc")
Pid = int | str  # "self" is this process
MOST_POINTS = 600


@dataclass(frozen=True)
class MemorySample:
    """One moment of one process, in bytes; `pss` is None where smaps_rollup may not be read."""

    DERIVED: ClassVar = ("rss",)

    rss_anon: int
    rss_file: int
    rss_shmem: int = 0
    pss: int | None = None
    major_faults: int | None = None  # since the process started: pages that had to come from the disk

    @property
    def rss(self) -> int:
        return self.rss_anon + self.rss_file + self.rss_shmem


@dataclass
class PeakMemory:
    """The largest of each that was sampled, in bytes; the peaks need not be of one moment."""

    rss_anon: int = 0
    rss_file: int = 0
    rss: int = 0
    high_water: int = 0  # VmHWM: the kernel's own peak of RSS since the process started, exact
    samples: int = 0
    pss: int | None = None  # where it was read: not by `PeakSampler`

    @property
    def highest_rss(self) -> int:
        return max(self.rss, self.high_water)


@dataclass(frozen=True)
class MemoryPoints:
    """RSS over time: seconds and bytes, a value a point."""

    seconds: list[float]
    rss_anon: list[int]
    rss_file: list[int]

    def __post_init__(self) -> None:
        if not len(self.seconds) == len(self.rss_anon) == len(self.rss_file):
            raise FieldError("seconds", "as many values as rss_anon and rss_file have", len(self.seconds))


@dataclass
class MemoryTimeline:
    """RSS over time, in bytes: at most `MOST_POINTS` points, evenly thinned as the run grows longer.

    Seconds are of the monotonic clock, less `origin`.
    """

    origin: float
    points: MemoryPoints = field(default_factory=lambda: MemoryPoints([], [], []))
    keep_every: int = 1
    seen: int = 0

    def add(self, rss_anon: int, rss_file: int) -> None:
        self.seen += 1
        if (self.seen - 1) % self.keep_every:
            return
        points = self.points
        if len(points.seconds) >= MOST_POINTS:
            for values in (points.seconds, points.rss_anon, points.rss_file):
                del values[1::2]
            self.keep_every *= 2
            if (self.seen - 1) % self.keep_every:
                return
        points.seconds.append(round(time.monotonic() - self.origin, 3))
        points.rss_anon.append(rss_anon)
        points.rss_file.append(rss_file)


def read_memory(pid: Pid = "self") -> MemorySample:
    """Memory of a process now.

    Raises:
        DeviceError: no such process, or a system without /proc.
    """
    try:
        held = resident_memory(pid, PROC)
        # Field 12 (majflt); the name in parentheses may itself hold spaces and parentheses.
        major_faults = int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[9])
    except OSError as error:
        raise DeviceError(f"memory of process {pid} cannot be read from {PROC}: {error.strerror}") from None
    return MemorySample(held.anon, held.file, held.shared, _pss(pid), major_faults)


class PeakSampler:
    """Samples a process from a thread while the `with` block runs; `peak` holds the result.

    One sample costs about 30 microseconds, a process that ends in the meantime ends the sampling. RSS
    spikes shorter than `interval` are caught by `peak.high_water` only.

    Args:
        pid: the process, "self" by default.
        interval: seconds between two samples.
        timeline: is given every sample.
    """

    def __init__(
        self, pid: Pid = "self", interval: float = 0.005, timeline: MemoryTimeline | None = None
    ) -> None:
        self.peak = PeakMemory()
        self._timeline = timeline
        self._pid, self._interval = pid, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-sampler", daemon=True)

    def __enter__(self) -> PeakSampler:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while self._sample() and not self._stop.wait(self._interval):
            pass

    def _sample(self) -> bool:
        try:
            held = resident_memory(self._pid, PROC)
        except OSError:
            return False
        anon, file = held.anon, held.file
        peak = self.peak
        peak.rss_anon = max(peak.rss_anon, anon)
        peak.rss_file = max(peak.rss_file, file)
        peak.rss = max(peak.rss, anon + file + held.shared)
        peak.high_water = max(peak.high_water, held.peak)
        peak.samples += 1
        if self._timeline is not None:
            self._timeline.add(anon, file)
        return True


def drop_page_cache(paths: Iterable[Path]) -> int:
    """Asks the kernel to forget the cached pages of files, so that the next read comes from the disk.

    Pages that some process has mapped stay, and tmpfs has no disk to read from.

    Returns:
        Bytes of the files that are still cached: 0 when everything is cold.
    """
    remaining = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # a dirty page cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            remaining += _cached_bytes(fd)
        finally:
            os.close(fd)
    return remaining


def _cached_bytes(fd: int) -> int:
    """Bytes of an open file that are in the page cache (mincore)."""
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)  # holds the address of a read-only mapping
        resident = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(resident.ctypes.data)
        )
        del view  # a mapping with a view on it cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return min(size, int(np.count_nonzero(resident & 1)) * mmap.PAGESIZE)


def _pss(pid: Pid) -> int | None:
    try:
        text = (PROC / str(pid) / "smaps_rollup").read_text()
    except OSError:  # another user's process, or a kernel before 4.14
        return None
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None
