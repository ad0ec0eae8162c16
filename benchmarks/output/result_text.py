"""Results as text: JSONL that programs for llama-bench read too, CSV, and markdown for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from gemma_edge.benchmarks.records.record import Head
from gemma_edge.benchmarks.records.results_file import append_record, json_line
from gemma_edge.benchmarks.records.rows import (
    BenchRow,
    BundleRow,
    EncodeRow,
    PrefixRow,
    Row,
    SessionRow,
    SpeculationRow,
    attached,
    threads_of,
)
from gemma_edge.benchmarks.records.run_report import Percentiles
from gemma_edge.devices.machine.memory import MemorySample, PeakMemory
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.typed_json import to_json
from gemma_edge.runtime.files.whole_file import write_whole
from gemma_edge.runtime.units import format_size

FORMATS = ("md", "json", "jsonl", "csv")
# What a spreadsheet wants: numbers and names, no lists.
CSV_FIELDS = (
    "run", "time", "device", "name", "engine", "recipe", "model_filename", "model_type", "model_size",
    "model_n_params", "n_threads", "test", "n_prompt", "n_gen", "n_depth", "avg_ns", "stddev_ns", "avg_ts",
    "stddev_ts", "median_ts", "bandwidth_gb_s", "bandwidth_share", "cpu_s", "cores_busy", "major_faults",
    "peak_rss_anon", "peak_rss", "temperature_c", "frequency_mhz", "cpu_info",
    "median_ns", "real_time", "load_s", "soft_tokens", "peak_rss_file",
)  # fmt: skip


def parse_outputs(text: str, run: str) -> list[tuple[str, Path | None]]:
    """`-o`: formats and files, with commas between: the first bare format goes to stdout (None), others to
    files.

    Raises:
        UsageError: neither a format nor a file name that ends in one.
    """
    outputs: list[tuple[str, Path | None]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind = part if part in FORMATS else Path(part).suffix[1:]
        if kind not in FORMATS:
            names = ", ".join(FORMATS)
            raise UsageError(f"-o {part}: expected {names}, or a file name that ends in one of them")
        on_stdout = part == kind and not any(path is None for _, path in outputs)
        outputs.append((kind, None if on_stdout else Path(part if part != kind else f"bench-{run}.{kind}")))
    if not outputs:
        raise UsageError(f"-o: expected {', '.join(FORMATS)}, or file names")
    return outputs


def render(rows: Sequence[Head], kind: str) -> str:
    """All rows in one format; CSV holds tests and encoders only."""
    if kind == "jsonl":
        return "".join(map(json_line, rows))
    if kind == "json":
        return "[\n" + ",\n".join(json_line(row).rstrip() for row in rows) + "\n]\n"
    return to_csv(rows) if kind == "csv" else to_markdown(rows)


def save(rows: Sequence[Head], kind: str, path: Path) -> None:
    """Appends to a JSONL file, replaces any other."""
    if kind == "jsonl":
        for row in rows:
            append_record(path, row)
    else:
        write_whole(path, render(rows, kind))


def to_csv(rows: Iterable[Head]) -> str:
    """Tests and encoders, a line each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(to_json(row) for row in rows if isinstance(row, BenchRow | EncodeRow))
    return text.getvalue()


def to_markdown(rows: Sequence[Head]) -> str:
    """The tests as a table, and below it the other measures of each session."""
    tests = [row for row in rows if isinstance(row, BenchRow)]
    lines = []
    if tests:
        several = len({row.device for row in tests}) > 1
        head = ["model", "engine", "threads", "test", "tok/s", "median", "of bandwidth"]
        lines += _table(_with_device(head, "device", several), (_test_cells(row, several) for row in tests))
    lines += _table_of(ENCODE_HEAD, [(row, encode_cells(row)) for row in rows if isinstance(row, EncodeRow)])
    lines += _table_of(PREFIX_HEAD, [(row, prefix_cells(row)) for row in rows if isinstance(row, PrefixRow)])
    speculated = [row for row in rows if isinstance(row, SpeculationRow)]
    lines += _table_of(SPECULATION_HEAD, [(row, speculation_cells(row)) for row in speculated])
    for session in (row for row in rows if isinstance(row, SessionRow)):
        title = ", ".join(filter(None, (f"{session.name} on {session.device}", threads_of(session))))
        lines += ["", *_table([title, ""], session_lines(session))]
    return "\n".join(lines).strip() + "\n"


def plus_minus(mean: float, deviation: float) -> str:
    """ "12.34 ± 0.05", "0.00570 ± 0.00012": below 1, two digits of the smaller number are kept."""
    smallest = min((abs(value) for value in (mean, deviation) if value), default=1.0)
    digits = min(6, max(2, 1 - math.floor(math.log10(smallest)))) if abs(mean) < 1 else 2
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _test_cells(row: BenchRow, device: bool) -> list[str]:
    share = row.bandwidth_share
    cells = [
        *_measured(row, row.test),
        plus_minus(row.avg_ts, row.stddev_ts),
        f"{row.median_ts:.2f}" if row.median_ts >= 1 else f"{row.median_ts:.3g}",
        f"{share:.0%} of {row.bandwidth_gb_s:.1f} GB/s" if share and row.bandwidth_gb_s else "",
    ]
    return _with_device(cells, row.device, device)


def _table_of(head: Sequence[str], rows: Sequence[tuple[BundleRow, Sequence[str]]]) -> list[str]:
    """Rows with their cells as a table behind an empty line; the device is named where there are several."""
    several = len({row.device for row, _ in rows}) > 1
    cells = (_with_device(cells, row.device, several) for row, cells in rows)
    return ["", *_table(_with_device(head, "device", several), cells)] if rows else []


def _measured(row: BenchRow | BundleRow, test: str) -> list[str]:
    """The first cells of a row: what was measured, and with what."""
    return [_name(row, row.recipe), row.engine, str(row.n_threads), test]


ENCODE_HEAD = ["model", "engine", "threads", "encode", "seconds", "median", "load", "RssAnon", "RssFile"]


def encode_cells(row: EncodeRow) -> list[str]:
    """An encoder for people, below ENCODE_HEAD; sizes are peaks."""
    speed = f", {row.real_time:.1f}x real time" if row.real_time else ""
    return [
        *_measured(row, row.test),
        plus_minus(row.avg_ns / 1e9, row.stddev_ns / 1e9),
        f"{row.median_s:.3g}{speed}",
        f"{row.load_s:.2f} s",
        format_size(row.peak_rss_anon),
        format_size(row.peak_rss_file),
    ]


PREFIX_HEAD = [
    "model",
    "engine",
    "threads",
    "prefix",
    "without",
    "restored",
    "sooner",
    "sooner, loaded",
    "file",
]


def prefix_cells(row: PrefixRow) -> list[str]:
    """Starts behind a prefix for people, below PREFIX_HEAD."""
    return [
        *_measured(row, row.test),
        f"{row.without_s:.2f} s",
        f"{row.restored_s:.2f} s",
        f"{row.sooner:.1f}x",
        f"{row.sooner_loaded:.1f}x",
        format_size(row.file_bytes),
    ]


SPECULATION_HEAD = ["model", "engine", "threads", "answer", "plain", "with drafts", "gain", "accepted"]


def speculation_cells(row: SpeculationRow) -> list[str]:
    """Answers with drafts for people, below SPECULATION_HEAD."""
    return [
        *_measured(row, row.test),
        f"{row.plain_tps:.2f} tok/s",
        f"{row.speculated_tps:.2f} tok/s",
        f"{row.speedup:.2f}x",
        f"{row.accepted} of {row.drafted}",
    ]


def session_lines(session: SessionRow) -> list[list[str]]:
    """Label and text of every measure of a session, for people."""
    lines: list[list[str]] = []

    def add(label: str, text: str | None) -> None:
        if text:
            lines.append([label, text])

    times = ((getattr(session.load, key), label) for key, label in _LOADS)
    add("load", ", ".join(f"{seconds:.2f} s {label}" for seconds, label in times if seconds is not None))
    if session.memory:
        add("memory, steady", _sizes(session.memory.steady))
        add("memory, peak", _sizes(session.memory.peak))
        if (faults := session.memory.steady.major_faults) is not None:
            add("major page faults", str(faults))
    if latency := session.latency:
        prompt = f"prompt of {latency.prompt_tokens}"
        add("time to first token", f"{_percentiles(latency.ttft_ms)}; {prompt}, {latency.requests} requests")
        add("between tokens", _percentiles(latency.itl_ms) if latency.itl_ms else None)
    if answer := session.answer:
        tests = ", ".join(map(str, answer.tests))
        add(f"an answer to {attached(answer.images, answer.clips)}", tests)
        add(
            "an answer, peak RssAnon",
            ", ".join(f"{p.name} {format_size(p.peak.rss_anon)}" for p in answer.phases if p.peak),
        )
        add("an answer, ceiling", answer.ceiling.text if answer.ceiling else None)
    add("ceiling", session.ceiling.text if session.ceiling else None)
    add("sustained", session.sustained.text if session.sustained else None)
    for ratio in session.ratios:
        add(f"against {ratio.engine}", f"{ratio.test}: {ratio.ratio:.2f}x, median of {ratio.rounds}")
    for bar in session.bars:
        add(bar.what, f"{bar.value:.2f}, asked for {bar.bar:g}: {'met' if bar.met else 'MISSED'}")
    for note in session.notes:
        add("note", note)
    add("failed", session.error)
    return lines


_LOADS = (
    ("first_s", "first, packing weights"),
    ("cold_s", "cold"),
    ("warm_s", "warm"),
    ("limited_s", "under the limit"),
    ("import_s", "import"),
)
_SIZES = (("rss_anon", "RssAnon"), ("rss_file", "RssFile"), ("pss", "Pss"), ("rss", "RSS"))


def _sizes(sample: MemorySample | PeakMemory) -> str:
    sizes = ((name, getattr(sample, key)) for key, name in _SIZES)
    return ", ".join(f"{name} {format_size(size)}" for name, size in sizes if size is not None)


def _percentiles(values: Percentiles) -> str:
    return f"P50 {values.p50:.1f} ms, P90 {values.p90:.1f} ms, P99 {values.p99:.1f} ms"


def _name(row: Row, recipe: str | None) -> str:
    return " ".join(filter(None, (row.name, recipe)))


def _with_device(cells: Sequence[str], device: str, several: bool) -> list[str]:
    return [device, *cells] if several else list(cells)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
