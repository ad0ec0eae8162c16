"""Devices that are known by name: memory, processor and bandwidth, as data with sources."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gemma_edge.devices.machine.cpu_features import ARM64
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import parse_size

FILE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class KnownDevice:
    """A device, as `known_devices.toml` describes it.

    Attributes:
        name: such as "pi5-2gb".
        title: the same for people.
        memory_bytes: of the device.
        usable: the share of it that a model may take.
        system, arch, cpu_flags: as in `DeviceFacts`.
        bandwidth_gb_s: 10^9 bytes a second that a decode step reads at most; None where nobody says.
        kind: of that number: "measured by others" or "vendor".
        sources: addresses of pages that say so.
    """

    name: str
    title: str
    memory_bytes: int
    usable: float
    system: str
    arch: str
    cpu_flags: tuple[str, ...]
    bandwidth_gb_s: float | None
    kind: str
    sources: tuple[str, ...]

    @property
    def usable_bytes(self) -> int:
        return int(self.usable * self.memory_bytes)


@cache
def known_devices() -> dict[str, KnownDevice]:
    """All of them, by name."""
    found = {}
    for data in tomllib.loads(FILE.read_text(encoding="utf-8")).values():
        for name, size in data["names"].items():
            found[name] = KnownDevice(
                name,
                data["title"],
                parse_size(size),
                data["usable"],
                data["system"],
                data["arch"],
                tuple(data["cpu_flags"]),
                data.get("bandwidth_gb_s"),
                data.get("kind", ""),
                tuple(data["sources"]),
            )
    return found


def known_device(name: str) -> KnownDevice:
    """The device of a name. Raises UsageError, with the names that there are."""
    devices = known_devices()
    if name not in devices:
        close = difflib.get_close_matches(name, devices, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        names = ", ".join(devices)
        raise UsageError(f"no device {name!r} is known.{hint} Choose {names}; or ask one with --device")
    return devices[name]


def formats_for(system: str, arch: str, cpu_flags: tuple[str, ...]) -> tuple[str, ...]:
    """The formats that run on such a machine, the one that docs/formats.md recommends first."""
    if system == "Android":
        return ("litertlm",)
    if not litert_runs(arch, cpu_flags):
        return ("onnx",)
    return ("tflite", "onnx") if arch in ARM64 else ("onnx", "tflite")


def litert_runs(arch: str, cpu_flags: tuple[str, ...]) -> bool:
    """Whether LiteRT's kernels run on this processor, as far as we know."""
    return ("atomics" if arch in ARM64 else "avx") in cpu_flags
