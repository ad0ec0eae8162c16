"""Results as one HTML page: speed, memory against the ceiling over time, latency, a comparison of runs.

    gemma-edge report benchmarks/results/*.jsonl -o report.html
    gemma-edge report results.jsonl -o report.html --png report.png --md report.md

The page is one file that needs no network, light or dark as the reader's system is. `--png` takes a picture
of it with Chromium or Chrome, where there is one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.machine.child import ChildError, run_child
from gemma_edge.benchmarks.output.charts import (
    Bar,
    Layer,
    Mark,
    area_chart,
    bar_chart,
    histogram,
    line_chart,
    number,
)
from gemma_edge.benchmarks.output.report_style import STYLE
from gemma_edge.benchmarks.output.table import latest_rows
from gemma_edge.benchmarks.records.record import read_records
from gemma_edge.benchmarks.records.rows import (
    ENCODE_HEAD,
    encode_cells,
    session_lines,
    threads_of,
    to_markdown,
)
from gemma_edge.benchmarks.script import progress
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.units import format_size

Json = dict[str, Any]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_VARIABLE = "GEMMA_EDGE_CHROMIUM"
SERIES = 6
MOST_PIXELS = 16_000
_TELL_HEIGHT = "document.title = 'height ' + document.documentElement.scrollHeight"
_HEIGHT = re.compile(r"<title>height (\d+)</title>")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSONL files of results")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="(default: report.html)",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="a picture of the page too")
    parser.add_argument("--dark", action="store_true", help="the picture in dark")
    parser.add_argument("--md", type=Path, metavar="FILE", help="the tables as markdown too")


def run(args: argparse.Namespace) -> int:
    """The verb. Raises RecordError for a file that holds no results, DeviceError where there is no
    browser.
    """
    records = [record for path in args.results for record in read_records(path)]
    if not records:
        raise UsageError(f"{', '.join(map(str, args.results))}: no results in there")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(render_page(records), encoding="utf-8")
    print(args.output)
    if args.md:
        args.md.write_text(to_markdown(_newest(records)), encoding="utf-8")
        print(args.md)
    if args.png:
        screenshot(args.output, args.png, dark=args.dark)
        print(args.png)
    return 0


def render_page(records: Sequence[Json]) -> str:
    """The whole page, from records of every kind."""
    tests = [record for record in records if record["kind"] == "bench"]
    sessions = [record for record in records if record["kind"] == "session"]
    times = sorted(record["time"] for record in records)
    span = times[0][:10] if times[0][:10] == times[-1][:10] else f"{times[0][:10]} to {times[-1][:10]}"
    devices = sorted({str(record.get("device", "local")) for record in tests + sessions})
    about = f"{len(sessions)} sessions, {len(tests)} tests, {', '.join(devices)}; {span}" if tests else span
    sections = [
        _overview(sessions, tests),
        _speed(tests),
        _encoding([record for record in records if record["kind"] == "encode"]),
        _memory(sessions),
        _latency(sessions),
        _sustained(sessions),
        _comparison(tests),
        _ratios(sessions),
        _other(records),
        _details(sessions),
        _machines(records),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>gemma-edge benchmarks</title>'
        f"<style>{STYLE}</style></head><body><main><header><h1>gemma-edge benchmarks</h1>"
        f"<p>{escape(about)}</p></header>{''.join(filter(None, sections))}</main></body></html>\n"
    )


def _section(title: str, lead: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class=lead>{escape(lead)}</p>{''.join(content)}</section>"


def _figure(caption: str, chart: str, legend: Sequence[tuple[str, int]] = ()) -> str:
    keys = "".join(f'<span><i class="s{series}"></i>{escape(name)}</span>' for name, series in legend)
    keys = f"<div class=legend>{keys}</div>" if keys else ""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{keys}{chart}</figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _title(record: Json) -> str:
    """What a run is called: the name, on which device and how many threads, for a session the engine too."""
    parts = [record["name"], record.get("device", "local"), threads_of(record)]
    if record["kind"] == "session":
        parts.append(record.get("engine", ""))
    return " · ".join(filter(None, parts))


def _overview(sessions: Sequence[Json], tests: Sequence[Json]) -> str:
    cards = []
    for session in sessions[-8:]:
        own = [t for t in tests if _same_session(t, session)]
        tiles = []
        for what, key in (("prefill", "n_prompt"), ("decode", "n_gen")):
            if found := [test for test in own if test[key]]:
                best = found[0]
                tiles.append((f"{number(best['median_ts'])}", "tok/s", f"{what}, {best['test']}"))
        if latency := session.get("latency"):
            tiles.append((number(latency["ttft_ms"]["p50"]), "ms", "first token, P50"))
        if memory := session.get("memory"):
            value, _, unit = format_size(memory["peak"]["rss_anon"]).partition(" ")
            tiles.append((value, unit, "RssAnon, peak"))
        body = "".join(
            f"<div><b>{escape(value)}</b> <small>{escape(unit)}</small><span>{escape(label)}</span></div>"
            for value, unit, label in tiles
        )
        cards.append(
            f"<article><h3>{escape(_title(session))}</h3><div class=tiles>{body}</div>{_badge(session)}"
        )
        cards.append("</article>")
    return f"<section class=cards>{''.join(cards)}</section>" if cards else ""


def _badge(session: Json) -> str:
    if error := session.get("error"):
        return f'<p class="badge bad">failed: {escape(error)}</p>'
    badges = []
    if ceiling := session.get("ceiling"):
        look = "bad" if not ceiling["met"] else "good" if ceiling["enforced"] else "warn"
        badges.append(f'<p class="badge {look}">ceiling: {escape(ceiling["text"])}</p>')
    for bar in session.get("bars") or ():
        text = f"{bar['what']}: {number(bar['value'])}, asked for {number(bar['bar'])}"
        badges.append(f'<p class="badge {"good" if bar["met"] else "bad"}">{escape(text)}</p>')
    return "".join(badges)


def _same_session(test: Json, session: Json) -> bool:
    threads = (session.get("workload") or {}).get("threads")
    same = test.get("run") == session.get("run") and test["n_threads"] == threads
    return same and test["device"] == session["device"] and test["engine"] == session.get("engine")


def _speed(tests: Sequence[Json]) -> str:
    charts = []
    for what, key in (("Prefill", "n_prompt"), ("Decode", "n_gen")):
        own = [test for test in tests if test[key]]
        if not own:
            continue
        engines = list(dict.fromkeys(test["engine"] for test in own))
        bars = [
            Bar(
                f"{test['test']} · {_title(test)}",
                test["avg_ts"],
                test["stddev_ts"],
                tuple(test["samples_ts"]),
                engines.index(test["engine"]) % SERIES,
            )
            for test in sorted(own, key=lambda t: (t[key], t["n_depth"], t["time"]))
        ]
        legend = [(engine, i % SERIES) for i, engine in enumerate(engines)]
        charts.append(
            _figure(f"{what}, tokens per second: mean, ± sd, samples", bar_chart(bars, "tok/s"), legend)
        )
    lead = "The model alone: no tokenizer, no sampling (pp and tg as in llama-bench; @ d is the depth)."
    return _section("Speed", lead, *charts) if charts else ""


def _encoding(rows: Sequence[Json]) -> str:
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    charts = []
    for encoder, what in (("vision", "An image"), ("audio", "The longest clip")):
        bars = [
            Bar(
                f"{row['test']} · {_title(row)}",
                row["avg_ns"] / 1e9,
                row["stddev_ns"] / 1e9,
                tuple(ns / 1e9 for ns in row["samples_ns"]),
                engines.index(row["engine"]) % SERIES,
            )
            for row in rows
            if row["encoder"] == encoder
        ]
        if bars:
            legend = [(engine, i % SERIES) for i, engine in enumerate(engines)]
            charts.append(_figure(f"{what}, seconds: mean, ± sd, samples", bar_chart(bars, "s"), legend))
    lead = "Noise to soft tokens, encoder loaded; memory is the peak of the process, decoder not loaded."
    table = _table(ENCODE_HEAD, map(encode_cells, rows))
    return _section("Images and audio", lead, *charts, table) if charts else ""


def _memory(sessions: Sequence[Json]) -> str:
    charts = []
    for session in sessions:
        timeline = (session.get("memory") or {}).get("timeline")
        if not timeline or len(timeline["seconds"]) < 2:
            continue
        limit = (session.get("ceiling") or {}).get("limit_bytes") or 0
        bands = [(phase["name"], phase["start_s"], phase["end_s"]) for phase in session.get("phases") or ()]
        end = timeline["seconds"][-1]
        top = max(*timeline["rss_anon"], limit)
        unit, scale = ("GiB", 2**30) if top >= 2**30 else ("MiB", 2**20)
        layers = [
            Layer(name, [size / scale for size in timeline[key]], series)
            for series, (name, key) in enumerate((("RssAnon", "rss_anon"), ("RssFile", "rss_file")))
        ]
        chart = area_chart(
            timeline["seconds"],
            layers,
            y_format=partial(_with_unit, unit),
            x_unit="seconds",
            marks=[Mark(f"ceiling {format_size(limit)}", limit / scale)] if limit else [],
            bands=[(name, min(start, end), min(stop, end)) for name, start, stop in bands],
        )
        legend = [("RssAnon: must stay in memory", 0), ("RssFile: can be read again from flash", 1)]
        charts.append(_figure(_title(session), chart, legend))
    lead = "What the process holds, from loading to the last test; the shaded ranges are its phases."
    return _section("Memory over time", lead, *charts) if charts else ""


def _with_unit(unit: str, value: float) -> str:
    return f"{number(value)} {unit}"


def _latency(sessions: Sequence[Json]) -> str:
    charts = []
    for session in sessions:
        latency = session.get("latency")
        if not latency or not latency.get("samples_itl_ms"):
            continue
        gaps, first = latency["itl_ms"], latency["ttft_ms"]
        marks = [Mark(f"{key.upper()} {number(gaps[key])} ms", gaps[key]) for key in ("p50", "p90", "p99")]
        waits = f"first token after {number(first['p50'])} ms (P50), {number(first['p99'])} (P99)"
        caption = f"{_title(session)}: {waits}"
        charts.append(
            _figure(caption, histogram(latency["samples_itl_ms"], marks, x_unit="ms between tokens"))
        )
    lead = "What a user waits for, tokenizer and sampling included: the gaps between the tokens of an answer."
    return _section("Latency", lead, *charts) if charts else ""


def _sustained(sessions: Sequence[Json]) -> str:
    charts = []
    for session in sessions:
        points = (session.get("sustained") or {}).get("points") or ()
        if len(points) < 2:
            continue
        minutes = [point["t_s"] / 60 for point in points]
        speed = line_chart(
            minutes,
            [Layer("decode", [p["tg_ts"] for p in points])],
            y_format=partial(_with_unit, "tok/s"),
            x_unit="minutes",
        )
        charts.append(_figure(f"{_title(session)}: {session['sustained']['text']}", speed))
        if all(point.get("temperature_c") is not None for point in points):
            heat = [Layer("temperature", [point["temperature_c"] for point in points], 1)]
            chart = line_chart(minutes, heat, y_format=partial(_with_unit, "°C"), x_unit="minutes")
            charts.append(_figure("temperature of the hottest zone", chart))
    return _section("Sustained", "Prefill and decode in turn, without a pause.", *charts) if charts else ""


def _comparison(tests: Sequence[Json]) -> str:
    """Runs as columns, tests as rows; each speed with its ratio to the first run that has the test."""
    columns = list(dict.fromkeys((test["run"], _title(test), test["engine"]) for test in tests))
    if len(columns) < 2:
        return ""
    cells: dict[str, dict[tuple[str, str, str], float]] = {}
    for test in sorted(tests, key=lambda t: (not t["n_prompt"], t["n_prompt"] + t["n_gen"], t["n_depth"])):
        cells.setdefault(test["test"], {})[(test["run"], _title(test), test["engine"])] = test["median_ts"]
    rows = []
    for name, speeds in cells.items():
        first = next(speeds[column] for column in columns if column in speeds)
        texts = [f"{number(speeds[c])}{_ratio(speeds[c], first)}" if c in speeds else "" for c in columns]
        rows.append([name, *texts])
    dates = {test["run"]: test["time"][:16].replace("T", " ") for test in tests}
    head = ["test", *(f"{title} · {engine} · {dates[run]}" for run, title, engine in columns)]
    lead = (
        "Median tokens per second, and the ratio to the first run that has the test. Runs of different "
        "minutes on a busy machine are no fair comparison; interleaved ratios are."
    )
    return _section("Runs compared", lead, _table(head, rows))


def _ratio(speed: float, first: float) -> str:
    return f" ({speed / first:.2f}x)" if first else ""


def _ratios(sessions: Sequence[Json]) -> str:
    rows = [
        [
            _title(session),
            ratio["engine"],
            ratio["test"],
            f"{ratio['ratio']:.2f}x",
            ", ".join(map(number, ratio["samples"])),
        ]
        for session in sessions
        for ratio in session.get("ratios") or ()
    ]
    lead = "Our speed over the peer's, interleaved: the median of ratios within a round."
    return (
        _section("Peers", lead, _table(["bundle", "peer", "test", "ratio", "of each round"], rows))
        if rows
        else ""
    )


def _other(records: Sequence[Json]) -> str:
    rows = [[row["row"], row["bar"], row["value"]] for row in latest_rows(records)]
    lead = "Rows of the README's table, the latest of each."
    return _section("Measured against a bar", lead, _table(["what", "bar", "measured"], rows)) if rows else ""


def _details(sessions: Sequence[Json]) -> str:
    parts = [
        f"<h3>{escape(_title(session))}, {escape(session['time'])}</h3>"
        + _table(["", ""], session_lines(session))
        for session in sessions
    ]
    return _section("Sessions", "All that was measured beside speed.", *parts) if parts else ""


def _machines(records: Sequence[Json]) -> str:
    machines: dict[str, Json] = {}
    for record in records:
        environment = record.get("environment") or {}
        if environment.get("cpu"):
            machines.setdefault(f"{record.get('device', 'local')}: {environment['cpu']}", environment)
    rows = []
    for name, env in machines.items():
        versions = ", ".join(f"{key} {value}" for key, value in (env.get("versions") or {}).items() if value)
        memory = format_size(env["memory_bytes"]) if env.get("memory_bytes") else ""
        flags = " ".join(env.get("cpu_flags") or ())
        rows.append(
            [name, str(env.get("cores_usable", "")), memory, str(env.get("kernel", "")), flags, versions]
        )
    head = ["device", "cores", "memory", "system", "instructions", "software"]
    return _section("Machines", "Where it was measured.", _table(head, rows)) if rows else ""


def _newest(records: Sequence[Json]) -> list[Json]:
    return sorted(records, key=lambda record: str(record["time"]))


def find_browser() -> str | None:
    """GEMMA_EDGE_CHROMIUM, or a Chromium or Chrome on the PATH; None where there is none."""
    given = os.environ.get(BROWSER_VARIABLE)
    return next((found for name in (given, *BROWSERS) if name and (found := shutil.which(name))), None)


def screenshot(page: Path, picture: Path, *, dark: bool = False, width: int = 1000) -> None:
    """A picture of a whole page.

    Raises:
        DeviceError: there is no browser, or it takes no picture.
    """
    browser = find_browser()
    if browser is None:
        raise DeviceError(f"--png needs Chromium or Chrome: install one, or set {BROWSER_VARIABLE}")
    with tempfile.TemporaryDirectory(prefix="gemma-edge-browser-") as folder:
        argv = [
            browser,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            argv.append("--no-sandbox")  # Chromium refuses to run as root with it
        text = page.read_text(encoding="utf-8")
        if dark:
            text = text.replace("<html ", '<html data-theme="dark" ', 1)
        copy = Path(folder, "page.html")
        # A picture is as large as the window, so the page is asked for its height first.
        copy.write_text(text.replace("</body>", f"<script>{_TELL_HEIGHT}</script></body>"), encoding="utf-8")
        size = f"--window-size={width},600"
        asked = run_child([*argv, size, "--dump-dom", copy.as_uri()], timeout=120, what=browser)
        height = _HEIGHT.search(asked.stdout)
        if asked.exit_code or not height:
            raise ChildError(browser, asked) if asked.exit_code else DeviceError(f"{browser}: no page")
        size = f"--window-size={width},{min(int(height[1]), MOST_PIXELS)}"
        argv += [size, f"--screenshot={picture.resolve()}", copy.as_uri()]
        done = run_child(argv, timeout=120, what=browser)
    if done.exit_code:
        raise ChildError(browser, done)
    if not picture.is_file():
        raise DeviceError(f"{browser} took no picture of {page}: {done.last_line()}")
    progress(f"picture: {picture}")
