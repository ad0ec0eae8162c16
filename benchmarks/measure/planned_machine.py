"""Machines to plan an export for: known by name or asked, and the speeds that were measured there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma_edge.benchmarks.records.results_file import read_records
from gemma_edge.benchmarks.records.rows import BenchRow
from gemma_edge.devices.base import Device, DeviceFacts
from gemma_edge.devices.known_devices import formats_for, known_device
from gemma_edge.devices.machine.bandwidth import Bandwidth, bandwidth_argv
from gemma_edge.export.device_plans import Machine
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.units import format_size

PROBE_SECONDS = 2.0


def known_machine(name: str) -> Machine:
    """A device of `known_devices.toml`. Raises UsageError if there is none of this name."""
    device = known_device(name)
    usable, memory = format_size(device.usable_bytes), format_size(device.memory_bytes)
    speed = "bandwidth not known"
    if device.bandwidth_gb_s:
        speed = f"{device.bandwidth_gb_s:g} GB/s ({device.kind}: {device.sources[0]})"
    return Machine(
        f"{name}, {device.title}: we assume {usable} of {memory} for a model; {speed}",
        device.usable_bytes,
        formats_for(device.system, device.arch, device.cpu_flags),
        device.bandwidth_gb_s,
    )


def asked_machine(device: Device) -> Machine:
    """A device that tells of itself, and whose bandwidth is measured now if it has Python."""
    facts, gb_s = device.facts, None
    if facts.python and facts.system != "Android":
        threads = len(facts.big_cores) or facts.cores or 1
        tell(f"measuring the bandwidth of {device.spec} with {threads} threads")
        run = device.run(bandwidth_argv(device.python(), threads, PROBE_SECONDS), timeout=120)
        gb_s = run.parse(Bandwidth, "the bandwidth probe").median_gb_s
    return described_machine(facts, gb_s)


def described_machine(facts: DeviceFacts, gb_s: float | None = None) -> Machine:
    """A machine of these facts, of whose memory a model may take what is available."""
    speed = f"{gb_s:.1f} GB/s (measured now)" if gb_s else "bandwidth not known"
    formats = formats_for(facts.system, facts.arch, facts.cpu_flags)
    memory = f"{format_size(facts.memory_available_bytes)} of {format_size(facts.memory_bytes)} available"
    name = f"{facts.name or facts.spec}, {facts.cpu}: {memory}; {speed}"
    return Machine(name, facts.memory_available_bytes, formats, gb_s)


def measured_speeds(path: Path) -> Mapping[tuple[str, str, int], float]:
    """The decode tests of a results file, by format, recipe and bytes a token; the fastest of each."""
    found: dict[tuple[str, str, int], float] = {}
    for row in read_records(path):
        if isinstance(row, BenchRow) and row.n_gen and row.format and row.recipe and row.bytes_per_token:
            key = (row.format, row.recipe, row.bytes_per_token)
            found[key] = max(found.get(key, 0.0), row.median_ts)
    return found
