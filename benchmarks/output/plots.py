"""The README's plots, from the committed records: speed beside peers of the same run, and memory.

Bars come from the latest `compare` and `ceiling` record of each name, in the order of the records. The same
records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gemma_edge.benchmarks.compare import PEERS
from gemma_edge.benchmarks.output.charts import Bar, Mark, bar_chart, picture
from gemma_edge.benchmarks.output.report_style import PICTURE_STYLE
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_size

Json = dict[str, Any]
GIGABYTE = 1e9
# Colours: ours, and each peer's. The other bundle of a comparison is ours, and no peer to be shown.
AGAINST = "against_decode_ts"
OURS, COLOURS = 0, {"llama_cpp": 1, "litert_lm": 2}


def render_plots(records: Sequence[Json]) -> dict[str, tuple[str, str]]:
    """The plots that the records have figures for: file name to (title, SVG).

    Raises:
        UsageError: a record without the fields that its script writes.
    """
    try:
        return _render(records)
    except (KeyError, IndexError, TypeError) as error:
        raise UsageError(f"a record of a comparison or a ceiling is not complete: {error!r}") from None


def _render(records: Sequence[Json]) -> dict[str, tuple[str, str]]:
    compared, limited = _latest(records, "compare"), _latest(records, "ceiling")
    plots = {}
    for what, test in (("prefill", "Prefill"), ("decode", "Decode")):
        if bars := _speed(compared, what):
            note = "tokens per second; each group interleaved in one run, its median and a dot a round"
            plots[f"{what}.svg"] = (test, note, bar_chart(bars, "tokens per second"))
    if bars := _memory(compared, limited):
        note = "GB; solid: RssAnon, must stay; pale: file pages, can be read again; peers: RSS, not divided"
        marks = sorted({record["metrics"]["limit_bytes"] for record in limited})
        ceilings = [Mark(format_size(limit), limit / GIGABYTE) for limit in marks]
        plots["memory.svg"] = ("Peak memory", note, bar_chart(bars, "GB", ceilings))
    return {
        name: (title, picture(chart, title, note, PICTURE_STYLE))
        for name, (title, note, chart) in plots.items()
    }


def _latest(records: Sequence[Json], kind: str) -> list[Json]:
    """Of each name the latest record, at the place of the first."""
    latest: dict[str, Json] = {}
    for record in records:
        if record["kind"] == kind:
            name = record["name"]
            if name not in latest or record["time"] >= latest[name]["time"]:
                latest[name] = record
    return list(latest.values())


def _speed(compared: Sequence[Json], what: str) -> list[Bar]:
    """Ours and its peers' bars of each comparison; the bar is the median of what the rounds measured."""
    bars: list[Bar] = []
    for record in compared:
        metrics, rounds = record["metrics"], record["raw"]["rounds"]
        peers = [peer for peer in COLOURS if f"{peer}_{what}_ts" in metrics]
        if not peers:
            continue
        ours = _of_rounds([round_["kernel"] for round_ in rounds], what)
        speed = metrics[f"{what}_ts"]
        bars.append(Bar(record["name"], speed, samples=ours, series=OURS, group=bool(bars)))
        for peer in peers:
            runs = [round_[peer] for round_ in rounds]
            label = f"{PEERS[peer][0]}, {runs[0]['model']}"
            samples = _of_rounds(runs, what)
            bars.append(Bar(label, metrics[f"{peer}_{what}_ts"], samples=samples, series=COLOURS[peer]))
    return bars


def _of_rounds(runs: Sequence[Json], what: str) -> tuple[float, ...]:
    """The mean speed of a test in each of the runs."""
    kind = "n_prompt" if what == "prefill" else "n_gen"
    return tuple(test["avg_ts"] for run in runs for test in run["tests"] if test[kind])


def _memory(compared: Sequence[Json], limited: Sequence[Json]) -> list[Bar]:
    """Peaks of each bundle, of those only measured under a limit too, and of the peers' files."""
    ours: dict[str, Bar] = {}
    for record in compared:
        name, metrics = record["name"], record["metrics"]
        if AGAINST not in metrics:  # a bundle beside another one of ours is shown by its own record
            ours[name] = _peak(name, metrics["peak_rss_anon_bytes"], metrics["peak_rss_bytes"])
    for record in limited:
        name, kernel = record["name"], record["raw"]["run"]["kernel"]
        if name not in ours and kernel:
            peak = kernel["memory"]["peak"]
            label = f"{name}, under {format_size(record['metrics']['limit_bytes'])}"
            ours[name] = _peak(label, peak["rss_anon"], peak["high_water"])
    theirs: dict[str, Bar] = {}
    for record in compared:
        for peer, series in COLOURS.items():
            if size := record["metrics"].get(f"{peer}_peak_rss_bytes"):
                label = f"{PEERS[peer][0]}, {record['raw']['rounds'][0][peer]['model']}"
                theirs[label] = Bar(label, size / GIGABYTE, series=series)
    peers = list(theirs.values())
    if ours and peers:
        peers[0] = replace(peers[0], group=True)
    return [*ours.values(), *peers]


def _peak(label: str, rss_anon: float, rss: float) -> Bar:
    return Bar(label, rss_anon / GIGABYTE, series=OURS, more=max(0.0, rss - rss_anon) / GIGABYTE)
