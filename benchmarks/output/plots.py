"""Plots of the committed records: speed beside peers of the same run, memory, and servers.

Bars come from the latest `compare`, `ceiling` and `serve` record of each name, in the order of the records.
The same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from gemma_edge.benchmarks.output.charts import Bar, Mark, bar_chart, picture
from gemma_edge.benchmarks.output.report_style import PICTURE_STYLE
from gemma_edge.benchmarks.records.measurement import PEER_TITLES, Measurement, peer_key
from gemma_edge.benchmarks.records.record import (
    PROFILE,
    CeilingRecord,
    CompareRecord,
    Head,
    Metrics,
    Record,
)
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_size

T = TypeVar("T", bound=Head)
GIGABYTE = 1e9
# Colours: ours, and each peer's. The other bundle of a comparison is ours, and no peer to be shown.
AGAINST = "against_decode_ts"
OURS, COLOURS = 0, {"llama.cpp": 1, "litert-lm": 2}
PEER = 1  # another server
PART = 2  # of a decode step


def render_plots(records: Sequence[Head]) -> dict[str, tuple[str, str]]:
    """The plots that the records have figures for: file name to (title, SVG).

    Raises:
        UsageError: a comparison or a ceiling without the metrics of its kind.
    """
    compared, limited = _latest(records, CompareRecord), _latest(records, CeilingRecord)
    plots = {}
    for what, test in (("prefill", "Prefill"), ("decode", "Decode")):
        if bars := _speed(compared, what):
            note = "tokens per second; each group interleaved in one run, its median and a dot a round"
            plots[f"{what}.svg"] = (test, note, bar_chart(bars, "tokens per second"))
    if bars := _memory(compared, limited):
        note = "GB; solid: RssAnon, must stay; pale: file pages, can be read again; peers: RSS, not divided"
        limits = sorted({_number(record.metrics, "limit_bytes", record) for record in limited})
        ceilings = [Mark(format_size(int(limit)), limit / GIGABYTE) for limit in limits]
        plots["memory.svg"] = ("Peak memory", note, bar_chart(bars, "GB", ceilings))
    for key, title in (("ttft_s", "First token of eight chats"), ("total_s", "Eight chats in all")):
        if bars := _race(_latest(records, Record), key):
            note = "seconds; less is better; each group's servers in turn, the median and a dot a round"
            plots[f"serve-{key.removesuffix('_s')}.svg"] = (title, note, bar_chart(bars, "seconds"))
    if bars := _parts(record for record in _latest(records, Record) if record.kind == PROFILE):
        note = "milliseconds, in the quickest tenth of the steps; parts below 1 % are left out"
        plots["profile.svg"] = ("Where a decode step goes", note, bar_chart(bars, "ms"))
    return {
        name: (title, picture(chart, title, note, PICTURE_STYLE))
        for name, (title, note, chart) in plots.items()
    }


def _number(metrics: Metrics, key: str, record: Head) -> float:
    value = metrics.get(key)
    if not isinstance(value, int | float):
        raise UsageError(f"the {record.kind} record of {record.name}, {record.time}, has no metric {key}")
    return value


def _latest(records: Iterable[Head], kind: type[T]) -> list[T]:
    """Of each name the latest record, at the place of the first."""
    latest: dict[str, T] = {}
    for record in records:
        if isinstance(record, kind):
            before = latest.get(record.name)
            if before is None or record.time >= before.time:
                latest[record.name] = record
    return list(latest.values())


def _speed(compared: Sequence[CompareRecord], what: str) -> list[Bar]:
    """Ours and its peers' bars of each comparison; the bar is the median of what the rounds measured."""
    bars: list[Bar] = []
    for record in compared:
        metrics, rounds = record.metrics, record.raw.rounds
        peers = [peer for peer in COLOURS if f"{peer_key(peer)}_{what}_ts" in metrics]
        if not peers:
            continue
        ours = _of_tests([test for round_ in rounds for test in round_.kernel.tests], what)
        speed = _number(metrics, f"{what}_ts", record)
        bars.append(Bar(record.name, speed, samples=ours, series=OURS, group=bool(bars)))
        for peer in peers:
            runs = [round_.peers[peer] for round_ in rounds if peer in round_.peers]
            label = f"{PEER_TITLES[peer]}, {runs[0].model}" if runs else PEER_TITLES[peer]
            samples = _of_tests([test for run in runs for test in run.tests], what)
            speed = _number(metrics, f"{peer_key(peer)}_{what}_ts", record)
            bars.append(Bar(label, speed, samples=samples, series=COLOURS[peer]))
    return bars


def _race(records: Sequence[Record], key: str) -> list[Bar]:
    """Our server's bar and the other one's, of each race; see `serve_records.race_record`."""
    bars: list[Bar] = []
    for record in records:
        metrics = record.metrics
        if f"peer_{key}" not in metrics:
            continue
        ours, peer = "gemma-edge", str(metrics["peer"])
        for name, series, metric in ((ours, OURS, key), (peer, PEER, f"peer_{key}")):
            raw = record.raw[name]
            samples = raw["total_s"] if key == "total_s" else [each / 1000 for each in raw["ttft_ms"]]
            label = record.name if name == ours else name
            group = name == ours and bool(bars)
            value = _number(metrics, metric, record)
            bars.append(Bar(label, value, samples=tuple(samples), series=series, group=group))
    return bars


def _parts(records: Iterable[Record]) -> list[Bar]:
    """The step of each record, and below it its parts, the largest first."""
    bars: list[Bar] = []
    for record in records:
        parts = {name: _number(record.metrics, name, record) for name in record.metrics}
        step = sum(parts.values())
        bars.append(Bar(record.name, step, series=OURS, group=bool(bars)))
        bars += [Bar(name, ms, series=PART) for name, ms in parts.items() if ms >= step / 100]
    return bars


def _of_tests(tests: Iterable[Measurement], what: str) -> tuple[float, ...]:
    """The mean speed of every test of that kind."""
    return tuple(test.avg_ts for test in tests if (test.n_prompt if what == "prefill" else test.n_gen))


def _memory(compared: Sequence[CompareRecord], limited: Sequence[CeilingRecord]) -> list[Bar]:
    """Peaks of each bundle, of those only measured under a limit too, and of the peers' files."""
    ours: dict[str, Bar] = {}
    for record in compared:
        if AGAINST not in record.metrics:  # a bundle beside another one of ours is shown by its own record
            anon, rss = (
                _number(record.metrics, key, record) for key in ("peak_rss_anon_bytes", "peak_rss_bytes")
            )
            ours[record.name] = _peak(record.name, anon, rss)
    for proof in limited:
        run = proof.raw.run
        if proof.name not in ours and run.kernel and run.kernel.memory:
            peak = run.kernel.memory.peak
            label = f"{proof.name}, under {format_size(run.limit_bytes)}"
            ours[proof.name] = _peak(label, peak.rss_anon, peak.high_water)
    theirs: dict[str, Bar] = {}
    for record in compared:
        for peer, series in COLOURS.items():
            runs = [round_.peers[peer] for round_ in record.raw.rounds if peer in round_.peers]
            if runs and f"{peer_key(peer)}_peak_rss_bytes" in record.metrics:
                label = f"{PEER_TITLES[peer]}, {runs[0].model}"
                size = _number(record.metrics, f"{peer_key(peer)}_peak_rss_bytes", record)
                theirs[label] = Bar(label, size / GIGABYTE, series=series)
    peers = list(theirs.values())
    if ours and peers:
        peers[0] = replace(peers[0], group=True)
    return [*ours.values(), *peers]


def _peak(label: str, rss_anon: float, rss: float) -> Bar:
    return Bar(label, rss_anon / GIGABYTE, series=OURS, more=max(0.0, rss - rss_anon) / GIGABYTE)
