"""What a machine's facts mean for gemma-edge: one `Finding` a line, ok, slow or missing, with the remedy.

    with open_device("ssh://pi@raspberrypi") as device:
        findings = examine(device.facts)

Nothing is asked of the device here: the facts say all, so recorded ones can be judged again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gemma_edge.devices.base import DeviceFacts
from gemma_edge.devices.facts import OLDEST_PYTHON, version_of
from gemma_edge.devices.known_devices import litert_runs
from gemma_edge.devices.machine.cpu_features import ARM64
from gemma_edge.runtime.units import format_size

Verdict = Literal["ok", "slow", "missing"]
X86_64 = ("x86_64", "amd64")
# The newest libc that a wheel of ours asks for: ONNX Runtime's, manylinux_2_28.
OLDEST_GLIBC = (2, 28)
# Degrees Celsius at which a Raspberry Pi begins to clock down; boards with fans stay below.
HOT_C = 80.0
ROOM_BYTES = 400 << 20  # of an installation with one engine, while pip unpacks it
ENGINES = ("onnxruntime", "ai-edge-litert")
_ARM_32 = ("armv6l", "armv7l", "armv8l", "arm")
_OS_64 = "install the 64-bit system: wheels exist for aarch64 and x86_64 alone"


@dataclass(frozen=True)
class Finding:
    """One line of `gemma-edge doctor`.

    Attributes:
        verdict: "missing" keeps something from working, "slow" costs time or memory.
        remedy: a sentence that says what to do; "" where nothing is to be done.
    """

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""

    def line(self, width: int = 16) -> str:
        remedy = f"  -> {self.remedy}" if self.remedy else ""
        return f"{self.verdict:<8} {self.name:<{width}} {self.found}{remedy}"


def examine(facts: DeviceFacts) -> list[Finding]:
    """The findings about a machine, from the most basic one on."""
    checks: tuple[Callable[[DeviceFacts], Iterator[Finding]], ...] = (
        _processor,
        _onnxruntime,
        _litert,
        _litert_lm,
        _clock,
        _heat,
        _memory,
        _swap,
        _memory_controller,
        _pages,
        _libc,
        _python,
        _disk,
        _installed,
    )
    return [finding for check in checks for finding in check(facts)]


def cannot_install(facts: DeviceFacts) -> Finding | None:
    """The first finding that keeps gemma-edge from being installed there, or None."""
    needed = (_processor, _libc, _python)
    return next((f for check in needed for f in check(facts) if f.verdict == "missing"), None)


def judge_need(facts: DeviceFacts, name: str, needed: int, remedy: str) -> Finding:
    """Whether a bundle that needs so many bytes of memory fits; `remedy` is for one that never does."""
    free, size = format_size(facts.memory_available_bytes), format_size(facts.memory_bytes)
    said = f"{name} needs {format_size(needed)}"
    if needed <= facts.memory_available_bytes:
        return Finding("fits", "ok", f"{said}, {free} is available")
    if needed <= facts.memory_bytes:
        said = f"{said}, {free} of {size} is available"
        return Finding("fits", "slow", said, "end other programs, such as the desktop, before it runs")
    return Finding("fits", "missing", f"{said}, there is {size} in all", remedy)


def _processor(facts: DeviceFacts) -> Iterator[Finding]:
    said = f"{facts.cpu or 'unknown'}, {facts.arch}, {facts.cores} cores"
    if facts.arch in _ARM_32 or (facts.bits == 32 and facts.arch in (*ARM64, *X86_64)):
        yield Finding("processor", "missing", f"{said}, a 32-bit system", _OS_64)
    elif facts.arch not in (*ARM64, *X86_64):
        yield Finding("processor", "missing", said, "use a machine with aarch64 or x86_64")
    else:
        flags = ", ".join(facts.cpu_flags)
        yield Finding("processor", "ok", f"{said}{': ' if flags else ''}{flags}")


def _onnxruntime(facts: DeviceFacts) -> Iterator[Finding]:
    name, flags = "ONNX Runtime", set(facts.cpu_flags)
    if facts.arch in ARM64:
        if "asimddp" not in flags:
            yield Finding(
                name,
                "slow",
                "no dotprod: it has no int8 kernel for 4-bit weights here and computes in fp32",
                "expect slow prefill, and prefer short prompts",
            )
        else:
            better = "dotprod and i8mm" if "i8mm" in flags else "dotprod"
            yield Finding(name, "ok", f"{better}: int8 kernels")
    elif facts.arch in X86_64:
        if "avx2" not in flags:
            yield Finding(name, "slow", "no AVX2: its oldest kernels", "use a newer processor")
        elif flags & {"avx512_vnni", "avx_vnni"}:
            amx = ", and AMX" if "amx_int8" in flags else ""
            yield Finding(name, "ok", f"VNNI{amx}: int8 kernels")
        else:
            yield Finding(name, "ok", "AVX2; without VNNI, 4-bit products are bound by arithmetic")


def _litert(facts: DeviceFacts) -> Iterator[Finding]:
    name, flags = "LiteRT", set(facts.cpu_flags)
    onnx = "export with --format onnx"
    if facts.arch in ARM64:
        if not litert_runs(facts.arch, facts.cpu_flags):
            lacks = "no LSE atomics: an emulated Cortex-A72 ends with an illegal instruction"
            yield Finding(name, "missing", lacks, onnx)
        elif "asimddp" not in flags:
            yield Finding(name, "slow", "no dotprod: XNNPACK multiplies int8 without it", onnx)
        else:
            yield Finding(name, "ok", "dotprod and i8mm" if "i8mm" in flags else "dotprod")
    elif facts.arch in X86_64:
        if not litert_runs(facts.arch, facts.cpu_flags):
            yield Finding(name, "missing", "no AVX: it ends with an illegal instruction", onnx)
        else:
            yield Finding(name, "ok", "AVX2" if "avx2" in flags else "AVX")


def _litert_lm(facts: DeviceFacts) -> Iterator[Finding]:
    if facts.arch in ARM64:
        has = "atomics" in facts.cpu_flags
        yield Finding(
            "LiteRT-LM",
            "ok" if has else "missing",
            "LSE atomics" if has else "no LSE atomics: it aborts",
            "" if has else "export with --format onnx and use gemma-edge",
        )


def _clock(facts: DeviceFacts) -> Iterator[Finding]:
    if "powersave" in facts.governors and facts.arch in ARM64:
        remedy = "echo ondemand | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        yield Finding("clock", "slow", "governor powersave: the lowest frequency", remedy)


def _heat(facts: DeviceFacts) -> Iterator[Finding]:
    degrees = facts.temperature_c
    said = "no sensor" if degrees is None else f"{degrees:g} °C"
    voltage = "under-voltage"
    if facts.throttled:
        power = voltage in facts.throttled
        remedy = "use the board's own power supply" if power else "add a heat sink or a fan, and let it cool"
        yield Finding("temperature", "slow", f"{said}, now: {', '.join(facts.throttled)}", remedy)
    elif degrees is not None and degrees >= HOT_C:
        yield Finding("temperature", "slow", said, "add a heat sink or a fan, and let it cool")
    elif voltage in facts.was_throttled:
        yield Finding(
            "temperature",
            "slow",
            f"{said}, under-voltage since the start",
            "use the board's own power supply",
        )
    else:
        was = f", since the start: {', '.join(facts.was_throttled)}" if facts.was_throttled else ""
        yield Finding("temperature", "ok", f"{said}{was}")


def _memory(facts: DeviceFacts) -> Iterator[Finding]:
    said = f"{format_size(facts.memory_available_bytes)} of {format_size(facts.memory_bytes)} available"
    yield Finding("memory", "ok", said)


def _swap(facts: DeviceFacts) -> Iterator[Finding]:
    if not facts.swap_bytes:
        yield Finding("swap", "ok", "none")
        return
    kind = "zram" if facts.zram else "on disk"
    said = f"{format_size(facts.swap_used_bytes)} of {format_size(facts.swap_bytes)} used, {kind}"
    if facts.zram or facts.swap_used_bytes < 64 << 20:
        yield Finding("swap", "ok", said)
    else:
        yield Finding("swap", "slow", said, "end other programs: a model that is swapped out answers slowly")


def _memory_controller(facts: DeviceFacts) -> Iterator[Finding]:
    name = "memory limits"
    if facts.memory_controller:
        yield Finding(name, "ok", "control groups can limit memory")
    elif facts.memory_controller is False:
        file = facts.boot_file or "the kernel's command line"
        remedy = f'append "cgroup_enable=memory cgroup_memory=1" to the line in {file}, then restart'
        yield Finding(name, "missing", "the memory controller of control groups is off", remedy)


def _pages(facts: DeviceFacts) -> Iterator[Finding]:
    if facts.page_bytes is None:
        return
    said = f"{facts.page_bytes >> 10} KiB"
    if facts.page_bytes <= 1 << 16:
        yield Finding("page size", "ok", said)
    else:
        # The libraries in aarch64 wheels are aligned to 64 KiB.
        yield Finding("page size", "missing", said, "boot a kernel with pages of 4, 16 or 64 KiB")


def _libc(facts: DeviceFacts) -> Iterator[Finding]:
    said = facts.libc or "unknown"
    if said.startswith("glibc") and version_of(said) >= OLDEST_GLIBC:
        yield Finding("libc", "ok", said)
        return
    oldest = ".".join(map(str, OLDEST_GLIBC))
    if said == "bionic":
        remedy = "Android runs a .litertlm by the native runner: see docs/devices.md"
    elif said.startswith("glibc"):
        remedy = f"{oldest} or newer is needed: upgrade the system"
    else:
        remedy = f"wheels need glibc {oldest} or newer: use Debian, Raspberry Pi OS or Ubuntu"
    yield Finding("libc", "missing", said, remedy)


def _python(facts: DeviceFacts) -> Iterator[Finding]:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if version_of(facts.python) >= OLDEST_PYTHON:
        yield Finding("Python", "ok", f"{facts.python} ({facts.python_program})")
    elif facts.python is None:
        yield Finding("Python", "missing", "no python3", f"sudo apt install python3, {oldest} or newer")
    else:
        remedy = f"sudo apt install python{oldest}, or upgrade the system: {oldest} or newer is needed"
        yield Finding("Python", "missing", facts.python, remedy)


def _disk(facts: DeviceFacts) -> Iterator[Finding]:
    said = f"{format_size(facts.free_bytes)} free"
    if facts.free_bytes >= ROOM_BYTES:
        yield Finding("disk", "ok", said)
    else:
        remedy = f"free some: an installation takes up to {format_size(ROOM_BYTES)}, and the bundle its size"
        yield Finding("disk", "missing", said, remedy)


def _installed(facts: DeviceFacts) -> Iterator[Finding]:
    found = dict(facts.packages)
    engines = [f"{name} {found[name]}" for name in ENGINES if name in found]
    if engines:
        yield Finding("engines", "ok", ", ".join(engines))
    else:
        yield Finding("engines", "missing", "none installed", "gemma-edge deploy OUT DEVICE installs one")


def worst(findings: Sequence[Finding]) -> Verdict:
    """The gravest verdict."""
    verdicts = {finding.verdict for finding in findings}
    return "missing" if "missing" in verdicts else "slow" if "slow" in verdicts else "ok"
