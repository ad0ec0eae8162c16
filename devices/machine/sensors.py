"""Temperature, frequency, governor, throttling and battery, from /sys.

They explain a slow result: the processor was hot or clocked down. Virtual machines and many containers have
none of these files; the values are then None, not 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_edge.runtime.host.temperature import zone_temperatures

ROOT = Path("/sys")
# get_throttled of a Raspberry Pi: the bits that say "now"; 16 bits higher they say "since the start".
PI_FLAGS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_PI_THROTTLED = "devices/platform/soc/soc:firmware/get_throttled"


@dataclass(frozen=True)
class Battery:
    """A battery; unknown values are None."""

    percent: int | None = None
    status: str | None = None
    temperature_c: float | None = None


@dataclass(frozen=True)
class Sensors:
    """One reading; None for sensors that the machine does not have.

    Attributes:
        temperature_c: of the hottest zone.
        zones_c: the hottest zone of each type.
        frequency_mhz, max_frequency_mhz: of each group of cores that share a clock.
        governors: the frequency governors in use.
        throttle_count: events since boot (x86).
        throttled: reasons in force now (Raspberry Pi).
    """

    temperature_c: float | None = None
    zones_c: dict[str, float] | None = None
    frequency_mhz: list[int] | None = None
    max_frequency_mhz: list[int] | None = None
    governors: list[str] | None = None
    throttle_count: int | None = None
    throttled: list[str] | None = None
    battery: Battery | None = None


def read_sensors(root: Path = ROOT) -> Sensors:
    """The sensors that /sys has now."""
    cpu = root / "devices/system/cpu"
    policies = sorted(cpu.glob("cpufreq/policy*"), key=lambda p: int(p.name[6:] or 0))
    zones = zone_temperatures(root)
    return Sensors(
        temperature_c=max(zones.values(), default=None),
        zones_c=zones or None,
        frequency_mhz=_frequencies(policies, "scaling_cur_freq"),
        max_frequency_mhz=_frequencies(policies, "cpuinfo_max_freq"),
        governors=sorted({g for p in policies if (g := _text(p / "scaling_governor"))}) or None,
        throttle_count=_throttle_count(cpu),
        throttled=_pi_throttled(root / _PI_THROTTLED),
        battery=_battery(root / "class/power_supply"),
    )


def _frequencies(policies: list[Path], name: str) -> list[int] | None:
    values = [_number(policy / name) for policy in policies]
    return [value // 1000 for value in values if value is not None] or None


def _throttle_count(cpu: Path) -> int | None:
    """Of the cores and, once a package, of the packages; some cores may be offline."""
    counts = [_number(path) for path in cpu.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    counts.append(_number(cpu / "cpu0/thermal_throttle/package_throttle_count"))
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _pi_throttled(path: Path) -> list[str] | None:
    text = _text(path)
    try:
        bits = int(text, 16) if text else None
    except ValueError:
        return None
    return None if bits is None else [reason for bit, reason in PI_FLAGS.items() if bits >> bit & 1]


def _battery(folder: Path) -> Battery | None:
    for supply in sorted(folder.glob("*")):
        if _text(supply / "type") == "Battery":
            tenths = _number(supply / "temp")
            celsius = None if tenths is None else tenths / 10
            return Battery(_number(supply / "capacity"), _text(supply / "status"), celsius)
    return None


def _number(path: Path) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None
