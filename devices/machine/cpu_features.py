"""Detects CPU instructions that an engine needs and would abort without."""

from __future__ import annotations

import platform

from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.host.cpu_fingerprint import CPUINFO, core_flags

LITERT_LM = "litert-lm"
# Required by an engine's aarch64 build: the flag in /proc/cpuinfo and its name.
REQUIRED_FLAGS = {LITERT_LM: ("atomics", "LSE atomics (Armv8.1)")}
ARM64 = ("aarch64", "arm64")


def missing_feature(engine: str, machine: str, cpuinfo: str) -> str | None:
    """The instruction set extension that `engine` needs and this CPU lacks, or None.

    Args:
        engine: "litert-lm", "litert" or "onnxruntime".
        machine: as `platform.machine()` gives it.
        cpuinfo: text of /proc/cpuinfo; "" if there is no such file.
    """
    if engine not in REQUIRED_FLAGS or machine.lower() not in ARM64:
        return None
    flag, name = REQUIRED_FLAGS[engine]
    # One core without it is enough: the process may be scheduled there.
    return name if any(flag not in flags for flags in core_flags(cpuinfo)) else None


def check_engine(engine: str, *, machine: str | None = None, cpuinfo: str | None = None) -> None:
    """Refuses an engine that would abort on this CPU, before it is loaded.

    Args:
        engine, machine, cpuinfo: as for `missing_feature`; default: this machine's.

    Raises:
        DeviceError: says what the CPU lacks and what to use instead.
    """
    if cpuinfo is None:
        try:
            cpuinfo = CPUINFO.read_text(encoding="utf-8", errors="replace")
        except OSError:
            cpuinfo = ""
    if feature := missing_feature(engine, machine or platform.machine(), cpuinfo):
        raise DeviceError(
            f"{engine} would abort on this CPU, which lacks {feature} (a Raspberry Pi 4 or older does). "
            "Run the bundle with gemma-edge instead: an export with --format onnx or --format tflite"
        )
