"""Parses /proc/cpuinfo, of this machine or of a device."""

from __future__ import annotations

from collections.abc import Mapping

# Flags that decide which int4 and int8 kernels and which builds run; x86 and ARM.
CPU_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni",
    "amx_int8", "amx_tile",
    "neon", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme", "atomics",
)  # fmt: skip


def pairs(text: str, separator: str = ":") -> dict[str, str]:
    """Lines "key SEPARATOR value"; the first of each key, as the first processor's in cpuinfo."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, mark, value = line.partition(separator)
        if mark:
            found.setdefault(key.strip(), value.strip())
    return found


def cpu_flags(cpu: Mapping[str, str]) -> list[str]:
    """Those of CPU_FLAGS that the processor of such pairs has, in that order."""
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return [flag for flag in CPU_FLAGS if flag in flags]
