"""Records for the tables of the documents, from what a session measured.

Each record has its own lines of the table: the figure's label, the target that was named for it
(`--target FIGURE=TEXT`), and the measured value.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict

from gemma_edge.benchmarks.measure.answer_phases import FIRST
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.records.bundle_facts import BundleFacts
from gemma_edge.benchmarks.records.environment import Environment, environment, now
from gemma_edge.benchmarks.records.measurement import (
    PEER_TITLES,
    PrefixRun,
    SpeculationRun,
    by_test,
    peer_key,
)
from gemma_edge.benchmarks.records.record import (
    CeilingRaw,
    CeilingRecord,
    CompareRecord,
    Metrics,
    Record,
    RoundsRaw,
    TableRecord,
    TableRow,
)
from gemma_edge.benchmarks.records.rows import attached
from gemma_edge.benchmarks.records.run_report import Attempt, Phase, Round, RunReport
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_limit, format_size


class Figure(NamedTuple):
    """A figure of a comparison: its label and its form in the table."""

    label: str
    show: Callable[[float], str]


def _gigabytes(size: float) -> str:
    return format_size(int(size), binary=False)


FIGURES = {
    **{
        f"{peer_key(name)}_{what}_ratio": Figure(f"{what} against {title}", lambda value: f"{value:.2f}x")
        for name, title in PEER_TITLES.items()
        for what in ("prefill", "decode")
    },
    "bandwidth_share": Figure(
        "weights read while decoding, of stream-read bandwidth", lambda value: f"{value:.2f}"
    ),
    "rss_anon_bytes": Figure("RssAnon in steady state", _gigabytes),
    "load_s": Figure("load from a warm page cache", lambda value: f"{value:.1f} s"),
    "import_s": Figure("import of the runtime", lambda value: f"{value:.2f} s"),
}
# The targets of figures that are always in the table; `--target` replaces them.
TARGETS = {
    "vision": "recorded",
    "audio": "faster than real time",
    "prefix": ">= 10x sooner",
    "speculation": ">= 0.97x, copied >= 2.5x",
}
NAMES = (*FIGURES, *TARGETS)


def parse_targets(texts: Sequence[str]) -> dict[str, str]:
    """Targets from FIGURE=TEXT options. Raises UsageError for an unknown figure."""
    targets = {}
    for text in texts:
        name, mark, target = text.partition("=")
        if name not in NAMES or not mark:
            raise UsageError(f"--target {text}: expected FIGURE=TEXT with FIGURE one of {', '.join(NAMES)}")
        targets[name] = target
    return targets


class _Head(TypedDict):
    name: str
    model: str
    recipe: str
    time: str
    environment: Environment


@dataclass
class TableRecords:
    """Collects the records of one session in `records`."""

    name: str
    facts: BundleFacts
    workload: Workload
    targets: dict[str, str] = field(default_factory=dict)
    environment: Environment = field(default_factory=environment)
    records: list[TableRecord] = field(default_factory=list)

    def compared(self, rounds: Sequence[Round]) -> None:
        """Medians over the rounds, with a line for each figure that has a target and for each peer."""
        metrics = summarize_rounds(rounds, self.facts.bytes_per_token)
        rows = []
        for name, figure in FIGURES.items():
            value = metrics.get(name)
            if value is not None and (name in self.targets or name.endswith("_ratio")):
                text = figure.show(value) + _detail(name, metrics)
                rows.append(TableRow(f"{self.name}: {figure.label}", self.targets.get(name, ""), text))
        raw, kept = RoundsRaw(tuple(rounds)), {**metrics, "bytes_per_token": self.facts.bytes_per_token}
        self.records.append(
            CompareRecord(kind="compare", **self._head(), metrics={**kept}, raw=raw, readme=tuple(rows))
        )

    def limited(
        self, run: Attempt, control: Attempt | None, control_limit: int, *, images: int = 0, clips: int = 0
    ) -> None:
        """The proof of a ceiling; `control` is None if the kernel killed the run itself."""
        report, sizes = run.kernel, self._sizes()
        killed = control is not None and control.killed
        metrics: Metrics = {
            "limit_bytes": run.limit_bytes,
            "control_limit_bytes": control_limit,
            "completed": report is not None,
            "control_killed": killed,
            "peak_bytes": run.peak_bytes,
            "context": self._context(),
        }
        if images or clips:
            metrics |= {"images": images, "clips": clips}
            sizes = f"{attached(images, clips)}, {sizes.replace('prefill', 'prefill at least')}"
        value = "killed"
        if report is not None and report.memory is not None:
            anon = report.memory.peak.rss_anon
            metrics |= {"peak_rss_anon_bytes": anon, **_phase_metrics(report.phases)}
            metrics |= {f"{test.test}_ts": round(test.avg_ts, 3) for test in report.tests}
            end = "killed" if killed else "NOT killed"
            value = f"completes, peak RssAnon {_gigabytes(anon)}{_phases(report.phases)}; control {end}"
        limit, lower = format_limit(run.limit_bytes), format_limit(control_limit)
        label = f"{self.name}: {sizes} under a kernel limit of {limit}"
        row = TableRow(label, f"completes; control at {lower} is killed", value)
        raw = CeilingRaw(run, control or Attempt(control_limit, False))
        self.records.append(
            CeilingRecord(kind="ceiling", **self._head(), metrics=metrics, raw=raw, readme=(row,))
        )

    def encoded(self, report: RunReport, busy: float | None) -> None:
        """The time and memory of each encoder."""
        threads = self.workload.threads
        metrics: Metrics = {"threads": threads, "busy_cores": busy}
        rows = []
        for run in report.encode:
            metrics |= {
                f"{run.encoder}_s": round(run.median_s, 4),
                f"{run.encoder}_load_s": round(run.load_s, 4),
                f"{run.encoder}_peak_rss_anon_bytes": run.peak_rss_anon,
                f"{run.encoder}_peak_rss_file_bytes": run.peak_rss_file,
            }
            what, speed = f"one {run.pixels}x{run.pixels} image", ""
            if run.real_time is not None:
                metrics["real_time"] = run.real_time
                what, speed = f"{run.seconds:g} s of audio", f" ({run.real_time:.1f}x real time)"
            label = f"{self.name}: encode {what}, {threads} thread{'s' if threads > 1 else ''}"
            value = f"{run.median_s:.1f} s{speed}, peak RssAnon {_gigabytes(run.peak_rss_anon)}"
            rows.append(TableRow(label, self._target(run.encoder), value))
        raw = {"encode": report.encode, "notes": report.notes}
        self.records.append(
            Record(kind="encoders", **self._head(), metrics=metrics, raw=raw, readme=tuple(rows))
        )

    def answered(self, report: RunReport, images: int, clips: int) -> None:
        """One answer with attachments, without a limit."""
        memory = report.memory
        metrics: Metrics = {"images": images, "clips": clips, **_phase_metrics(report.phases)}
        label = (
            f"{self.name}: {attached(images, clips)}, {self._sizes().replace('prefill', 'prefill at least')}"
        )
        anon = _gigabytes(memory.peak.rss_anon) if memory else ""
        row = TableRow(label, "", f"peak RssAnon {anon}{_phases(report.phases)}")
        self.records.append(Record(kind="answer", **self._head(), metrics=metrics, raw=report, readme=(row,)))

    def restored(self, run: PrefixRun, busy: float | None) -> None:
        """Starts behind a prefix, without the prefix cache and with it."""
        threads = self.workload.threads
        metrics: Metrics = {
            "threads": threads,
            "busy_cores": busy,
            "prefix_tokens": run.prefix_tokens,
            "file_bytes": run.file_bytes,
            "sooner": run.sooner,
            "sooner_loaded": run.sooner_loaded,
            "without_s": round(run.without_s, 4),
            "restored_s": round(run.restored_s, 4),
        }
        label = f"{self.name}: a prompt behind {run.prefix_tokens:,} tokens from the prefix cache"
        value = (
            f"{run.sooner:.1f}x sooner ({run.without_s:.1f} s to {run.restored_s:.2f} s, loading included)"
        )
        row = TableRow(label, self._target("prefix"), value)
        self.records.append(Record(kind="restored", **self._head(), metrics=metrics, raw=run, readme=(row,)))

    def speculated(self, runs: Sequence[SpeculationRun], busy: float | None) -> None:
        """Forced answers, without drafts and with them."""
        metrics: Metrics = {"threads": self.workload.threads, "busy_cores": busy}
        for run in runs:
            metrics |= {
                f"{run.text}_speedup": run.speedup,
                f"{run.text}_accepted": run.accepted,
                f"{run.text}_drafted": run.drafted,
            }
        label = f"{self.name}: {runs[0].tokens} tokens decoded with drafts"
        value = ", ".join(f"{run.text} {run.speedup:.2f}x" for run in runs)
        row = TableRow(label, self._target("speculation"), value)
        self.records.append(
            Record(kind="speculated", **self._head(), metrics=metrics, raw=runs, readme=(row,))
        )

    def _head(self) -> _Head:
        return {
            "name": self.name,
            "model": self.facts.model,
            "recipe": self.facts.recipe,
            "time": now(),
            "environment": self.environment,
        }

    def _target(self, name: str) -> str:
        return self.targets.get(name, TARGETS.get(name, ""))

    def _context(self) -> int:
        return self.workload.context or self.facts.context

    def _sizes(self) -> str:
        work = self.workload
        return f"prefill {work.n_prompt}, decode {work.n_gen}, context {self._context()}"


def summarize_rounds(rounds: Sequence[Round], bytes_per_token: int) -> dict[str, float]:
    """Medians over the rounds, by the names of FIGURES, and the tokens per second that they come from.

    The load of the first round counts only if it is the only one: the page cache may have been cold.
    """
    columns: dict[str, list[float]] = {}

    def add(name: str, value: float | None) -> None:
        if value is not None:
            columns.setdefault(name, []).append(value)

    for index, round_ in enumerate(rounds):
        stream, kernel = round_.bandwidth, round_.kernel
        for test in kernel.tests:
            what = "prefill" if test.n_prompt else "decode"
            add(f"{what}_ts", test.avg_ts)
            for name, peer in round_.peers.items():
                if theirs := by_test(peer.tests).get(test.test):
                    add(f"{peer_key(name)}_{what}_ts", theirs.avg_ts)
                    add(f"{peer_key(name)}_{what}_ratio", test.avg_ts / theirs.avg_ts)
            if test.n_gen and stream:
                add("bandwidth_share", bytes_per_token * test.avg_ts / (stream.median_gb_s * 1e9))
        for name, peer in round_.peers.items():
            add(f"{peer_key(name)}_peak_rss_bytes", peer.peak_rss)
        add("busy_cores", round_.busy_cores)
        add("bandwidth_gb_s", stream.median_gb_s if stream else None)
        if memory := kernel.memory:
            add("rss_anon_bytes", memory.steady.rss_anon)
            add("peak_rss_anon_bytes", memory.peak.rss_anon)
            add("peak_rss_bytes", memory.peak.high_water)
        add("import_s", kernel.import_s)
        if index or len(rounds) == 1:
            add("load_s", kernel.load_s)
    return {name: round(statistics.median(values), 4) for name, values in columns.items()}


def _detail(name: str, metrics: dict[str, float]) -> str:
    if name.endswith("_ratio"):
        peer, _, what = name.removesuffix("_ratio").rpartition("_")
        return f" ({metrics[f'{what}_ts']:.1f} against {metrics[f'{peer}_{what}_ts']:.1f} tok/s)"
    return f" (of {metrics['bandwidth_gb_s']:.1f} GB/s)" if name == "bandwidth_share" else ""


def _phase_metrics(phases: Sequence[Phase]) -> Metrics:
    return {f"{p.name.replace(' ', '_')}_peak_rss_anon_bytes": p.peak.rss_anon for p in phases if p.peak}


def _phases(phases: Sequence[Phase]) -> str:
    """Peak RssAnon of each phase, in brackets; nothing for a run without such phases."""
    shown = [f"{p.name} {_gigabytes(p.peak.rss_anon)}" for p in phases if p.peak and p.name != FIRST]
    return f" ({', '.join(shown)})" if shown else ""
