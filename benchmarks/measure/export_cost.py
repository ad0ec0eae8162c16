"""The time and memory of an export, as a record for the tables."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from gemma_edge.benchmarks.records.bundle_facts import bundle_facts
from gemma_edge.benchmarks.records.environment import environment, now
from gemma_edge.benchmarks.records.record import Record, TableRow
from gemma_edge.benchmarks.records.results_file import append_record
from gemma_edge.devices.machine.memory import PeakSampler
from gemma_edge.export.exporter import Exported
from gemma_edge.runtime.units import format_size

INTERVAL = 0.02  # seconds between samples: a chunk of weights lives for about as long


def record_export(export: Callable[[], Exported], path: Path) -> Exported:
    """Runs `export` in this process and appends its record to a JSONL file.

    The parity gate loads the bundle in a process of its own, which is not measured.

    Raises:
        GemmaEdgeError: what `export` raises; nothing is recorded then.
    """
    start = time.perf_counter()
    with PeakSampler(interval=INTERVAL) as sampler:
        result = export()
    seconds, peak, name = time.perf_counter() - start, sampler.peak, result.path.resolve().name
    facts = bundle_facts(result.path)
    size = format_size(peak.rss_anon, binary=False)
    rows = [TableRow(f"{name}: export, peak RssAnon and time", "recorded", f"{size} in {seconds:.0f} s")]
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
