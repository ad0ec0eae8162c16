"""Results as one HTML page: speed, memory against the ceiling over time, latency, a comparison of runs.

The page is one file that needs no network, light or dark as the reader's system is. Charts are drawn twice,
for wide and for narrow screens, so that their letters keep their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources

import jinja2
from markupsafe import Markup

from gemma_edge.benchmarks.output.charts import (
    NARROW,
    WIDE,
    Bar,
    Layer,
    Mark,
    area_chart,
    bar_chart,
    histogram,
    line_chart,
    number,
    plus_minus,
)
from gemma_edge.benchmarks.output.report_style import STYLE
from gemma_edge.benchmarks.output.result_text import ENCODE_HEAD, encode_cells, session_lines
from gemma_edge.benchmarks.output.table import latest_rows
from gemma_edge.benchmarks.records.environment import Environment
from gemma_edge.benchmarks.records.record import Head
from gemma_edge.benchmarks.records.rows import BenchRow, EncodeRow, Row, SessionRow, threads_of
from gemma_edge.runtime.units import format_size

TEMPLATE = "report_page.html.j2"
SERIES = 6
MOST_CARDS = 8


@dataclass(frozen=True)
class Tile:
    """A large number with its unit and its label."""

    value: str
    unit: str
    label: str


@dataclass(frozen=True)
class Badge:
    """A verdict; `look` is "good", "warn" or "bad"."""

    text: str
    look: str


@dataclass(frozen=True)
class Card:
    """A session at a glance."""

    title: str
    facts: str
    tiles: list[Tile]
    badges: list[Badge]


@dataclass(frozen=True)
class Figure:
    """A chart in two widths, with names for its colours."""

    caption: str
    wide: Markup
    narrow: Markup
    legend: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class Table:
    """A table; a head of empty cells is left out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A section with its figures, then its tables."""

    title: str
    lead: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


class Titles:
    """Short titles of runs: the name, of device, threads and engine what differs, and "run 2" of equal ones.

    `facts` has the rest.
    """

    def __init__(self, records: Iterable[Head]) -> None:
        rows = [record for record in records if isinstance(record, Row)]
        columns = zip(*map(self._parts, rows), strict=True)
        self._differs = [len({part for part in column if part}) > 1 for column in columns]
        self._runs: dict[str, list[str]] = {}
        for row in sorted(rows, key=lambda row: row.time):
            runs = self._runs.setdefault(self._base(row), [])
            if row.run not in runs:
                runs.append(row.run)

    def __call__(self, record: Row) -> str:
        title = self._base(record)
        runs = self._runs[title]
        return title if len(runs) == 1 else f"{title} · run {runs.index(record.run) + 1}"

    def facts(self, record: Row) -> str:
        """Device, threads, engine and time."""
        return " · ".join(filter(None, (*self._parts(record), when(record))))

    @staticmethod
    def _parts(record: Row) -> list[str]:
        threads = threads_of(record) if isinstance(record, BenchRow | EncodeRow | SessionRow) else ""
        return [record.device, threads, (record.engine or "") if isinstance(record, SessionRow) else ""]

    def _base(self, record: Row) -> str:
        parts = zip(self._parts(record), self._differs, strict=True)
        return " · ".join(filter(None, (record.name, *(part for part, differs in parts if differs))))


def when(record: Head) -> str:
    """Day and minute."""
    return record.time[:16].replace("T", " ")


def render_page(records: Sequence[Head]) -> str:
    """The whole page, from records of every kind."""
    tests = [record for record in records if isinstance(record, BenchRow)]
    encoders = [record for record in records if isinstance(record, EncodeRow)]
    sessions = [record for record in records if isinstance(record, SessionRow)]
    title = Titles(records)
    days = sorted(record.time[:10] for record in records)
    about = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    if tests:
        devices = sorted({row.device for row in (*tests, *sessions)})
        about = f"{len(sessions)} sessions, {len(tests)} tests, {', '.join(devices)}; {about}"
    sections = [
        _speed(tests, title),
        _encoding(encoders, title),
        _memory(sessions, title),
        _latency(sessions, title),
        _sustained(sessions, title),
        _comparison(tests, title),
        _ratios(sessions, title),
        _other(records),
        _details(sessions, title),
        _machines(records),
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text("utf-8"))
    return template.render(
        style=Markup(STYLE),
        about=about,
        cards=[_card(session, tests, title) for session in sessions[-MOST_CARDS:]],
        sections=[section for section in sections if section.figures or section.tables],
    )


def _figure(
    caption: str,
    draw: Callable[..., str],
    *args: object,
    legend: Sequence[tuple[str, int]] = (),
    **more: object,
) -> Figure:
    wide, narrow = (Markup(draw(*args, width=width, **more)) for width in (WIDE, NARROW))
    return Figure(caption, wide, narrow, legend)


def _card(session: SessionRow, tests: Sequence[BenchRow], title: Titles) -> Card:
    own = [test for test in tests if _same_session(test, session)]
    tiles = []
    for what, attribute in (("prefill", "n_prompt"), ("decode", "n_gen")):
        if found := [test for test in own if getattr(test, attribute)]:
            tiles.append(Tile(number(found[0].median_ts), "tok/s", f"{what}, {found[0].test}"))
    if session.latency:
        tiles.append(Tile(number(session.latency.ttft_ms.p50), "ms", "first token, P50"))
    if session.memory:
        value, _, unit = format_size(session.memory.peak.rss_anon).partition(" ")
        tiles.append(Tile(value, unit, "RssAnon, peak"))
    return Card(title(session), title.facts(session), tiles, list(_badges(session)))


def _badges(session: SessionRow) -> Iterable[Badge]:
    if session.error:
        yield Badge(f"failed: {session.error}", "bad")
        return
    answer = session.answer.ceiling if session.answer else None
    for what, ceiling in (("ceiling", session.ceiling), ("ceiling of an answer", answer)):
        if ceiling:
            look = "bad" if not ceiling.met else "good" if ceiling.enforced else "warn"
            yield Badge(f"{what}: {ceiling.text}", look)
    for bar in session.bars:
        text = f"{bar.what}: {number(bar.value)}, asked for {number(bar.bar)}"
        yield Badge(text, "good" if bar.met else "bad")


def _same_session(test: BenchRow, session: SessionRow) -> bool:
    same = test.run == session.run and test.n_threads == session.n_threads
    return same and test.device == session.device and test.engine == session.engine


def _engines(rows: Iterable[BenchRow | EncodeRow]) -> dict[str, int]:
    """A colour for each engine."""
    return {engine: i % SERIES for i, engine in enumerate(dict.fromkeys(row.engine for row in rows))}


def _speed(tests: Sequence[BenchRow], title: Titles) -> Section:
    lead = "The model alone: no tokenizer, no sampling (pp and tg as in llama-bench; @ d is the depth)."
    section = Section("Speed", lead)
    for what, attribute in (("Prefill", "n_prompt"), ("Decode", "n_gen")):
        own = [test for test in tests if getattr(test, attribute)]
        own.sort(key=lambda test: (test.n_prompt + test.n_gen, test.n_depth, test.time))
        colours = _engines(own)
        bars = [
            Bar(
                f"{test.test} · {title(test)}",
                test.avg_ts,
                test.stddev_ts,
                tuple(test.samples_ts),
                colours[test.engine],
                shown=plus_minus(test.avg_ts, test.stddev_ts),
            )
            for test in own
        ]
        if bars:
            caption = f"{what}, tokens per second: mean, ± sd, samples"
            section.figures.append(_figure(caption, bar_chart, bars, "tok/s", legend=list(colours.items())))
    return section


def _encoding(rows: Sequence[EncodeRow], title: Titles) -> Section:
    lead = "Noise to soft tokens, encoder loaded; memory is the peak of the process, decoder not loaded."
    section, colours = Section("Images and audio", lead), _engines(rows)
    for encoder, what in (("vision", "An image"), ("audio", "The longest clip")):
        bars = [
            Bar(
                f"{row.test} · {title(row)}",
                row.avg_ns / 1e9,
                row.stddev_ns / 1e9,
                tuple(ns / 1e9 for ns in row.samples_ns),
                colours[row.engine],
                shown=plus_minus(row.avg_ns / 1e9, row.stddev_ns / 1e9),
            )
            for row in rows
            if row.encoder == encoder
        ]
        if bars:
            caption = f"{what}, seconds: mean, ± sd, samples"
            section.figures.append(_figure(caption, bar_chart, bars, "s", legend=list(colours.items())))
    if rows:
        section.tables.append(Table(ENCODE_HEAD, list(map(encode_cells, rows))))
    return section


def _memory(sessions: Sequence[SessionRow], title: Titles) -> Section:
    lead = "The memory of the process, from loading to the last test; the shaded ranges are its phases."
    section = Section("Memory over time", lead)
    for session in sessions:
        points = session.memory.timeline if session.memory else None
        if not points or len(points.seconds) < 2:
            continue
        limit, end = session.ceiling.limit_bytes if session.ceiling else 0, points.seconds[-1]
        unit, scale = ("GiB", 2**30) if max(*points.rss_anon, limit) >= 2**30 else ("MiB", 2**20)
        layers = [
            Layer(name, [size / scale for size in sizes], series)
            for series, (name, sizes) in enumerate(
                (("RssAnon", points.rss_anon), ("RssFile", points.rss_file))
            )
        ]
        figure = _figure(
            title(session),
            area_chart,
            points.seconds,
            layers,
            y_format=partial(_with_unit, unit),
            x_unit="seconds",
            marks=[Mark(f"ceiling {format_size(limit)}", limit / scale)] if limit else [],
            bands=[
                (phase.name, min(phase.start_s, end), min(phase.end_s, end))
                for phase in session.phases
                if phase.start_s is not None and phase.end_s is not None
            ],
            legend=[("RssAnon: must stay in memory", 0), ("RssFile: can be read again from flash", 1)],
        )
        section.figures.append(figure)
    return section


def _with_unit(unit: str, value: float) -> str:
    return f"{number(value)} {unit}"


def _latency(sessions: Sequence[SessionRow], title: Titles) -> Section:
    lead = "The user's wait, tokenizer and sampling included: the gaps between the tokens of an answer."
    section = Section("Latency", lead)
    for session in sessions:
        latency = session.latency
        if not latency or not latency.itl_ms or not latency.samples_itl_ms:
            continue
        gaps, first = latency.itl_ms, latency.ttft_ms
        marks = [
            Mark(f"{name} {number(value)} ms", value)
            for name, value in (("P50", gaps.p50), ("P90", gaps.p90), ("P99", gaps.p99))
        ]
        waits = f"first token after {number(first.p50)} ms (P50), {number(first.p99)} (P99)"
        caption = f"{title(session)}: {waits}"
        section.figures.append(
            _figure(caption, histogram, latency.samples_itl_ms, marks, x_unit="ms between tokens")
        )
    return section


def _sustained(sessions: Sequence[SessionRow], title: Titles) -> Section:
    section = Section("Sustained", "Prefill and decode in turn, without a pause.")
    for session in sessions:
        sustained = session.sustained
        if not sustained or len(sustained.points) < 2:
            continue
        minutes = [point.t_s / 60 for point in sustained.points]
        draw = partial(line_chart, minutes, x_unit="minutes")
        speeds = [Layer("decode", [point.tg_ts for point in sustained.points])]
        caption = f"{title(session)}: {sustained.text}"
        section.figures.append(_figure(caption, draw, speeds, y_format=partial(_with_unit, "tok/s")))
        heat = [point.temperature_c for point in sustained.points if point.temperature_c is not None]
        if len(heat) == len(minutes):
            layers = [Layer("temperature", heat, 1)]
            figure = _figure(
                "temperature of the hottest zone", draw, layers, y_format=partial(_with_unit, "°C")
            )
            section.figures.append(figure)
    return section


def _comparison(tests: Sequence[BenchRow], title: Titles) -> Section:
    """Runs as columns, tests as rows; each speed with its ratio to the first run that has the test."""
    section = Section(
        "Runs compared",
        "Median tokens per second, and the ratio to the first run that has the test. Runs of different "
        "minutes on a busy machine are no fair comparison; interleaved ratios are.",
    )
    columns = list(dict.fromkeys((test.run, title(test), test.engine) for test in tests))
    if len(columns) < 2:
        return section
    cells: dict[str, dict[tuple[str, str, str], float]] = {}
    for test in sorted(tests, key=lambda t: (not t.n_prompt, t.n_prompt + t.n_gen, t.n_depth)):
        cells.setdefault(test.test, {})[(test.run, title(test), test.engine)] = test.median_ts
    rows = []
    for name, speeds in cells.items():
        first = next(speeds[column] for column in columns if column in speeds)
        texts = [f"{number(speeds[c])} ({speeds[c] / first:.2f}x)" if c in speeds else "" for c in columns]
        rows.append([name, *texts])
    dates = {test.run: when(test) for test in tests}
    head = ["test", *(f"{name} · {engine} · {dates[run]}" for run, name, engine in columns)]
    section.tables.append(Table(head, rows))
    return section


def _ratios(sessions: Sequence[SessionRow], title: Titles) -> Section:
    section = Section("Peers", "Our speed over the peer's, interleaved: the median of ratios within a round.")
    rows = [
        [
            title(session),
            ratio.engine,
            ratio.test,
            f"{ratio.ratio:.2f}x",
            ", ".join(map(number, ratio.samples)),
        ]
        for session in sessions
        for ratio in session.ratios
    ]
    if rows:
        section.tables.append(Table(["bundle", "peer", "test", "ratio", "of each round"], rows))
    return section


def _other(records: Sequence[Head]) -> Section:
    section = Section("Measured against a target", "Rows of the documents' tables, the latest of each.")
    if rows := [[row.row, row.bar, row.value] for row in latest_rows(records)]:
        section.tables.append(Table(["", "target", "measured"], rows))
    return section


def _details(sessions: Sequence[SessionRow], title: Titles) -> Section:
    tables = [
        Table(["", ""], session_lines(session), f"{title(session)} · {title.facts(session)}")
        for session in sessions
    ]
    return Section("Sessions", "Every measure beside speed.", tables=tables)


def _machines(records: Sequence[Head]) -> Section:
    machines: dict[str, Environment] = {}
    for record in records:
        if record.environment.cpu:
            device = record.device if isinstance(record, Row) else "local"
            machines.setdefault(f"{device}: {record.environment.cpu}", record.environment)
    rows = []
    for name, machine in machines.items():
        versions = ", ".join(f"{key} {value}" for key, value in machine.versions.items() if value)
        memory = format_size(machine.memory_bytes) if machine.memory_bytes else ""
        cores, system = str(machine.cores_usable or ""), machine.kernel or ""
        rows.append([name, cores, memory, system, " ".join(machine.cpu_flags), versions])
    section = Section("Machines", "Where the figures were measured.")
    if rows:
        head = ["device", "cores", "memory", "system", "instructions", "software"]
        section.tables.append(Table(head, rows))
    return section
