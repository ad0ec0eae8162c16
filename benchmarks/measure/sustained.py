"""Sustained runs and warm machines: the end of a curve against its beginning, and what sensors noticed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from gemma_edge.benchmarks.records.rows import Sustained
from gemma_edge.benchmarks.records.run_report import SensorsAround, SustainedPoint


def summarize_sustained(points: Sequence[SustainedPoint] | None) -> Sustained | None:
    """The curve, with its first tenth against its last: the speed that a warm device keeps."""
    if not points:
        return None
    tenth = max(1, len(points) // 10)
    first, last = points[:tenth], points[-tenth:]
    begin, end = (round(statistics.median(p.tg_ts for p in part), 3) for part in (first, last))
    text = f"decode {begin:.2f} at the beginning, {end:.2f} tok/s at the end ({end / begin:.0%})"
    cool, hot = ([p.temperature_c for p in part if p.temperature_c is not None] for part in (first, last))
    if cool and hot:
        text += f", {statistics.median(cool):.0f} to {statistics.median(hot):.0f} °C"
    return Sustained(tuple(points), begin, end, round(end / begin, 4), text)


def sensor_notes(sensors: SensorsAround) -> list[str]:
    """Remarks for a reader of the results: the governor, throttling, the board's complaints."""
    before, after = sensors.before, sensors.after
    notes = []
    if slow := sorted(set(after.governors or ()) - {"performance"}):
        notes.append(f"the frequency governor is {', '.join(slow)}, not performance")
    throttled = (after.throttle_count or 0) - (before.throttle_count or 0)
    if throttled > 0:
        notes.append(f"the processor was throttled for its heat {throttled} times during the run")
    if reasons := sorted({*(before.throttled or ()), *(after.throttled or ())}):
        notes.append(f"the board reports: {', '.join(reasons)}")
    return notes
