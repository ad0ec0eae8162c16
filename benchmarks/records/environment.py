"""The machine and the software of a result."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata

from gemma_edge.devices.machine.cpu_info import cpu_flags, pairs
from gemma_edge.runtime.host.cpu_fingerprint import CPUINFO

_PACKAGES = ("gemma-edge", "numpy", "onnxruntime", "ai-edge-litert", "sentencepiece")


@dataclass(frozen=True)
class Environment:
    """The machine and the software, as far as a speed or a size depends on them; None for the unknown."""

    cpu: str | None = None
    cpu_flags: list[str] = field(default_factory=list)
    cores: int | None = None
    cores_usable: int | None = None
    memory_bytes: int | None = None
    machine: str | None = None
    kernel: str | None = None
    python: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)  # of packages


def environment() -> Environment:
    """This machine and this installation."""
    cpu = pairs(CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.is_file() else "")
    return Environment(
        cpu=cpu.get("model name") or cpu.get("Model") or cpu.get("Hardware") or platform.processor(),
        cpu_flags=cpu_flags(cpu),
        cores=os.cpu_count(),
        cores_usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        machine=platform.machine(),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={name: _version(name) for name in _PACKAGES},
    )


def now() -> str:
    """The time as records have it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
