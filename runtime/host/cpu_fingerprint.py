"""Which kernels this CPU gets: engines choose them by its instruction sets."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_FLAGS = ("flags", "Features")  # on x86-64, on Arm
_USUAL = {"avx2", "atomics"}
_VNNI = {"avx_vnni", "avx512_vnni"}


def core_flags(cpuinfo: str) -> list[set[str]]:
    """The instruction sets of each core, in the words of /proc/cpuinfo's text."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    return [set(flags.split()) for key, _, flags in lines if key.strip() in _FLAGS]


@cache
def has_usual_instructions() -> bool:
    """Whether engines that are built for most CPUs of today run here: x86-64 with AVX2, Arm with LSE atomics.

    False where nobody knows, too.
    """
    cores = core_flags(_cpuinfo())
    return bool(cores) and all(flags & _USUAL for flags in cores)


@cache
def adds_in_16_bits() -> bool:
    """Whether engines sum products of bytes in 16 bits here, which may saturate: x86-64 without VNNI."""
    return any("sse2" in flags and not flags & _VNNI for flags in core_flags(_cpuinfo()))


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@cache
def cpu_name() -> str:
    """The processor's name, as its maker wrote it; on Arm the numbers of its core designs."""
    named = dict.fromkeys(_values("model name")) or dict.fromkeys(_values("CPU part"))
    return ", ".join(named) or platform.machine()


def _values(key: str) -> list[str]:
    """Those of a field of /proc/cpuinfo, one a core."""
    lines = [line.partition(":") for line in _cpuinfo().splitlines()]
    return [value.strip() for name, _, value in lines if name.strip() == key]


@cache
def cpu_fingerprint() -> str:
    """Eight hex digits that differ where architecture or instruction sets do, as after an SD card moved."""
    flags = {line for line in _cpuinfo().splitlines() if line.split(":")[0].strip() in _FLAGS}
    return hashlib.sha256("\n".join([platform.machine(), *sorted(flags)]).encode()).hexdigest()[:8]
