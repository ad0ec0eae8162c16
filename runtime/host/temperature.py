"""Temperatures of the machine, from /sys."""

from __future__ import annotations

from pathlib import Path

SYS = Path("/sys")


def zone_temperatures(root: Path = SYS) -> dict[str, float]:
    """The hottest zone of each type, in degrees Celsius; empty where /sys has none."""
    zones: dict[str, float] = {}
    for zone in sorted(root.glob("class/thermal/thermal_zone*")):
        try:
            celsius = int((zone / "temp").read_text()) / 1000
        except (OSError, ValueError):
            continue
        # Zones that are switched off say nonsense: 0, or below absolute zero.
        if 0 < celsius < 200:
            name = _type(zone)
            zones[name] = max(celsius, zones.get(name, 0.0))
    return zones


def hottest(root: Path = SYS) -> float | None:
    """The hottest zone, in degrees Celsius; None where /sys has none."""
    return max(zone_temperatures(root).values(), default=None)


def _type(zone: Path) -> str:
    try:
        return (zone / "type").read_text().strip() or zone.name
    except OSError:
        return zone.name
