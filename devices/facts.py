"""Parses the output of `probe.sh`; tolerates missing and unusual answers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from gemma_edge.devices.base import DeviceFacts, Kind
from gemma_edge.devices.machine.cpu_info import cpu_flags, pairs
from gemma_edge.devices.machine.sensors import PI_FLAGS

OLDEST_PYTHON = (3, 11)
# Zones of /sys/class/thermal that are in or next to the processor.
_NEAR_CPU = re.compile(r"cpu|soc|pkg|core|tsens|big|little|acpitz", re.IGNORECASE)
# A sensor that is off reports 0, -40 or hundreds.
_PLAUSIBLE_C = (1.0, 130.0)
_TEMPERATURE = re.compile(r"Temperature\{mValue=([-\d.]+), mType=(\d+)")
_TYPE_CPU = 0  # android.os.Temperature.TYPE_CPU


def parse_facts(text: str, *, spec: str, kind: Kind) -> DeviceFacts:
    """Facts from what `probe.sh` printed; what is missing is None or empty."""
    parts = _sections(text)
    system, kernel, arch, name = ([*parts.get("uname", "").splitlines(), *[""] * 4])[:4]
    properties = dict(re.findall(r"^\[([^\]]+)\]: \[(.*)\]$", parts.get("getprop", ""), re.MULTILINE))
    android = "ro.build.version.release" in properties
    cpu = pairs(parts.get("cpuinfo", ""), ":")
    memory = pairs(parts.get("meminfo", ""), ":")
    cores = len(re.findall(r"^processor\s*:", parts.get("cpuinfo", ""), re.MULTILINE))
    khz = _by_core(parts.get("frequency", ""))
    speed = khz if len(set(khz.values())) > 1 else _by_core(parts.get("capacity", "")) or khz
    big = tuple(core for core, value in sorted(speed.items()) if value == max(speed.values()))
    power = _power(parts.get("power", ""))
    battery = pairs(parts.get("battery", ""), ":")
    python, program, bits = _python(parts.get("python", ""))
    swaps = _swaps(parts.get("swaps", ""))
    throttled, was_throttled = _throttled(parts.get("throttled", ""))
    notes = []
    if not khz:
        notes.append("the device reports no core frequencies")
    temperature = _temperature(parts)
    if temperature is None:
        notes.append("the device reports no temperature")
    release = pairs(parts.get("os-release", ""), "=").get("PRETTY_NAME", "").strip('"')
    maker = (
        f"{properties.get('ro.product.manufacturer', '')} {properties.get('ro.product.model', '')}".strip()
    )
    return DeviceFacts(
        spec=spec,
        kind=kind,
        name=maker or name,
        system="Android" if android else system,
        release=f"Android {properties['ro.build.version.release']}" if android else release,
        kernel=kernel,
        arch=arch,
        cpu=properties.get("ro.soc.model")
        or cpu.get("model name")
        or parts.get("model", "").strip("\0 \n")
        or cpu.get("Hardware", ""),
        cpu_flags=tuple(cpu_flags(cpu)),
        cores=cores,
        core_khz=tuple(value for _, value in sorted(khz.items())),
        big_cores=big or tuple(range(cores)),
        governors=tuple(sorted({value for _, value in _files(parts.get("governor", ""))})),
        memory_bytes=_kilobytes(memory.get("MemTotal")),
        memory_available_bytes=_kilobytes(memory.get("MemAvailable")),
        free_bytes=_free(parts.get("df", "")),
        temperature_c=temperature,
        thermal_status=_int(pairs(parts.get("thermalservice", ""), ":").get("Thermal Status")),
        battery_percent=_first(_int(battery.get("level")), power.get("capacity")),
        battery_c=_tenths(_first(_int(battery.get("temperature")), power.get("temp"))),
        on_power=_on_power(battery, power),
        python=python,
        libc="bionic" if android else _libc(parts.get("libc", "")),
        notes=tuple(notes),
        python_program=program,
        bits=bits or _int(parts.get("bits", "").strip()),
        page_bytes=_int(parts.get("page", "").strip()),
        swap_bytes=sum(swap.size for swap in swaps),
        swap_used_bytes=sum(swap.used for swap in swaps),
        zram=bool(swaps) and all("zram" in swap.name for swap in swaps),
        memory_controller=_memory_controller(parts.get("cgroups", ""), parts.get("controllers", "")),
        boot_file=parts.get("boot", "").partition("\n")[0].strip() or None,
        throttled=throttled,
        was_throttled=was_throttled,
        packages=_packages(parts.get("engines", "")),
    )


def parse_meminfo(text: str) -> dict[str, int]:
    """Bytes that `dumpsys meminfo PID` tells of a process: {"pss", "rss"}, those it has.

    Both layouts are read: a line "TOTAL PSS: n TOTAL RSS: n", and before Android 11 the table's "TOTAL n".
    """
    found = {}
    for key in ("PSS", "RSS"):
        if match := re.search(rf"TOTAL {key}:\s*([\d,]+)", text):
            found[key.lower()] = int(match[1].replace(",", "")) * 1024
    if "pss" not in found and (match := re.search(r"^\s*TOTAL:?\s+(\d+)", text, re.MULTILINE)):
        found["pss"] = int(match[1]) * 1024
    return found


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"^### (\S+)\n", text.replace("\r\n", "\n"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _files(text: str) -> list[tuple[str, str]]:
    """Lines "/path:content"."""
    return [
        (path, value.strip()) for path, mark, value in (x.partition(":") for x in text.splitlines()) if mark
    ]


def _by_core(text: str) -> dict[int, int]:
    found = {}
    for path, value in _files(text):
        core, number = re.search(r"/cpu(\d+)/", path), _int(value)
        if core and number is not None:
            found[int(core[1])] = number
    return found


def _temperature(parts: dict[str, str]) -> float | None:
    """The hottest sensor near the processor; Android's own service where /sys is closed; else any sensor."""
    kinds: dict[str, str] = {}
    degrees: dict[str, float] = {}
    for path, value in _files(parts.get("thermal", "")):
        zone, _, what = path.rpartition("/")
        if what == "type":
            kinds[zone] = value
        elif (milli := _int(value)) is not None:
            degrees[zone] = milli / 1000
    service = [
        (int(kind), float(value)) for value, kind in _TEMPERATURE.findall(parts.get("thermalservice", ""))
    ]
    choices: tuple[Iterable[float], ...] = (
        (value for zone, value in degrees.items() if _NEAR_CPU.search(kinds.get(zone, ""))),
        (value for kind, value in service if kind == _TYPE_CPU),
        (*degrees.values(), *(value for _, value in service)),
    )
    for values in choices:
        plausible = [value for value in values if _PLAUSIBLE_C[0] <= value <= _PLAUSIBLE_C[1]]
        if plausible:
            return round(max(plausible), 1)
    return None


def _power(text: str) -> dict[str, int]:
    """The first battery's capacity and temp, and whether a charger is `online`."""
    supplies: dict[str, dict[str, str]] = {}
    for path, value in _files(text):
        name, _, what = path.rpartition("/")
        supplies.setdefault(name, {})[what] = value
    found: dict[str, int] = {}
    for supply in supplies.values():
        is_battery = supply.get("type") == "Battery"
        for key in ("capacity", "temp") if is_battery else ("online",):
            if (number := _int(supply.get(key))) is not None:
                found[key] = max(found.get(key, number), number)
    return found


def _on_power(battery: dict[str, str], power: dict[str, int]) -> bool | None:
    plugs = [value for key, value in battery.items() if key.endswith(" powered")]
    if plugs:
        return "true" in plugs
    return bool(power["online"]) if "online" in power else None


def _free(text: str) -> int:
    fields = text.strip().rpartition("\n")[2].split()
    return _kilobytes(fields[3]) if len(fields) > 3 else 0


def _libc(text: str) -> str | None:
    if "musl" in text:
        return "musl"
    return text.split("\n")[0].strip() or None


def _python(text: str) -> tuple[str | None, str, int | None]:
    """Version, program and bits of the first interpreter that is new enough, or else of the first."""
    found = [[*line.split(), "", ""] for line in text.splitlines() if line.strip()]
    if not found:
        return None, "python3", None
    version, program, bits, *_ = next(
        (each for each in found if version_of(each[0]) >= OLDEST_PYTHON), found[0]
    )
    return version, program or "python3", _int(bits)


def version_of(text: str | None) -> tuple[int, ...]:
    """The first two numbers of a version, to be compared; () for none."""
    return tuple(map(int, re.findall(r"\d+", text or "")[:2]))


class _Swap(NamedTuple):
    name: str
    size: int
    used: int


def _swaps(text: str) -> list[_Swap]:
    """What /proc/swaps lists, in bytes: `Filename Type Size Used Priority`."""
    rows = [line.split() for line in text.splitlines()[1:]]
    return [_Swap(row[0], _kilobytes(row[2]), _kilobytes(row[3])) for row in rows if len(row) > 3]


def _memory_controller(cgroups: str, controllers: str) -> bool | None:
    """Whether control groups can limit memory: version 2 lists it, version 1 says that it is enabled."""
    if "memory" in controllers.split():
        return True
    rows = (line.split() for line in cgroups.splitlines())
    row = next((row for row in rows if len(row) == 4 and row[0] == "memory"), None)
    if row is None:
        return False if controllers.strip() else None
    _, hierarchy, _, enabled = row
    return enabled == "1" and (hierarchy != "0" or not controllers.strip())


def _throttled(text: str) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Reasons that are in force, and those that were; None where the machine does not tell."""
    digits = re.search(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]+)\s*$", text.strip())
    if digits is None:
        return None, ()
    bits = int(digits[1], 16)
    now = tuple(reason for bit, reason in PI_FLAGS.items() if bits >> bit & 1)
    return now, tuple(reason for bit, reason in PI_FLAGS.items() if bits >> (bit + 16) & 1)


def _packages(text: str) -> tuple[tuple[str, str], ...]:
    names = re.findall(r"/([A-Za-z0-9_.]+)-([^/\s-]+)\.dist-info$", text, re.MULTILINE)
    return tuple(sorted({(name.replace("_", "-"), version) for name, version in names}))


def _kilobytes(text: str | None) -> int:
    return 1024 * (_int((text or "").split(" ")[0]) or 0)


def _int(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None


def _tenths(value: int | None) -> float | None:
    return None if value is None else value / 10


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
