"""The time and memory of an export, as a record for the tables."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gemma_edge.benchmarks.records.bundle_facts import bundle_facts
from gemma_edge.benchmarks.records.environment import environment, now
from gemma_edge.benchmarks.records.record import Record, TableRow
from gemma_edge.benchmarks.records.results_file import append_record
from gemma_edge.devices.machine.memory import PeakSampler
from gemma_edge.export.exporter import Exported
from gemma_edge.runtime.host.process_memory import PROC, resident_memory
from gemma_edge.runtime.units import format_size

INTERVAL = 0.02  # seconds between samples: a chunk of weights lives for about as long
CHILDREN_INTERVAL = 0.5  # a look at every process takes some milliseconds


def record_export(export: Callable[[], Exported], path: Path) -> Exported:
    """Runs `export` in this process and appends its record to a JSONL file.

    The gate runs the bundle's engine in processes of its own: their memory is recorded by itself, their CPU
    time with the rest.

    Raises:
        GemmaEdgeError: what `export` raises; nothing is recorded then.
    """
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    with PeakSampler(interval=INTERVAL) as sampler, ChildrenPeak() as engine:
        result = export()
    seconds, peak, name = time.perf_counter() - start, sampler.peak, result.path.resolve().name
    cpu = _cpu_seconds() - cpu_start
    facts = bundle_facts(result.path)
    made = f"{format_size(peak.rss_anon, binary=False)} in {seconds:.0f} s, {cpu:.0f} s of CPU time"
    if result.agreement:
        made += f"; the gate's engine {format_size(engine.rss_anon, binary=False)}"
    how = "export" if result.agreement else "export without the gate"
    rows = [TableRow(f"{name}: {how}, peak RssAnon and time", "recorded", made)]
    if agreement := result.agreement:
        text = f"KL {agreement.mean_kl:.3g} nats, top-1 {agreement.top1:.1%}"
        rows.append(TableRow(f"{name}: agreement with its checkpoint", "within the recipe's bounds", text))
    record = Record(
        kind="export",
        name=name,
        model=facts.model,
        recipe=facts.recipe,
        time=now(),
        environment=environment(),
        metrics={
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "engine_peak_rss_anon_bytes": engine.rss_anon,
            "peak_rss_anon_bytes": peak.rss_anon,
            "peak_rss_bytes": peak.rss,
            "bundle_bytes": facts.file_bytes,
            "predicted_peak_bytes": result.plan.peak_bytes,
            "verified": agreement is not None,
        },
        raw={"agreement": agreement.to_dict() if agreement else None, "plan": result.plan.to_dict()},
        readme=tuple(rows),
    )
    append_record(path, record)
    return result


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


class ChildrenPeak:
    """The largest RssAnon, in bytes, of any process that this one starts while the `with` block runs."""

    def __init__(self) -> None:
        self.rss_anon = 0
        self._before = frozenset(_children())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="children-peak", daemon=True)

    def __enter__(self) -> ChildrenPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(CHILDREN_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        for pid in frozenset(_children()) - self._before:
            with contextlib.suppress(OSError):  # it has just ended
                self.rss_anon = max(self.rss_anon, resident_memory(pid).anon)


def _children() -> Iterator[int]:
    """The processes whose parent this one is."""
    for folder in PROC.iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                # Behind the name in parentheses, which may hold anything: the state, the parent.
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                    yield int(folder.name)
