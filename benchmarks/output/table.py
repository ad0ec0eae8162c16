"""The tables and plots of measured results, made from the committed records and from nothing else.

    gemma-edge report benchmarks/results/*.jsonl --readme README.md [--check]

The README has the most telling rows (`HIGHLIGHTS`). docs/results.md beside it has every row, the plots of
docs/img and the table of quality. Every record carries its own rows; if several records have the same row,
the latest record gives its value and the first record its place. `--check` writes nothing, and fails when a
document or a plot is out of date.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from gemma_edge.benchmarks.output.plots import render_plots
from gemma_edge.benchmarks.output.quality_table import render_methods, render_quality
from gemma_edge.benchmarks.records.record import Head, QualityRecord, TableRecord, TableRow
from gemma_edge.benchmarks.records.results_file import read_records
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from gemma_edge.runtime.files.whole_file import write_whole

PAGE, PLOTS = "docs/results.md", "docs/img"  # beside the README
# Blocks of the documents, each between comments with :begin and :end.
SHORT, RESULTS, QUALITY, METHODS = "highlights", "results", "quality", "methods"
# The README's rows: the label of a row in the records, and the README's words for it.
HIGHLIGHTS = {
    "fp32 bundle against transformers; 64 greedy tokens, prefill chunks (1, 7, 32, 90)": (
        "fp32 bundle against `transformers`: largest logit error; 64 greedy tokens"
    ),
    "E2B int4_g128, with encoders: export with calibration and gate, peak RssAnon and time": (
        "E2B, with image and audio encoders: memory and time of the whole export"
    ),
    "E2B int4_g128: prefill against llama.cpp": "E2B, ONNX Runtime: prefill against llama.cpp",
    "E2B int4_g128: decode against llama.cpp": "E2B, ONNX Runtime: decode against llama.cpp",
    "E2B int4_g128, LiteRT: prefill against llama.cpp": "E2B, LiteRT: prefill against llama.cpp",
    "E2B int4_g128, LiteRT: decode against llama.cpp": "E2B, LiteRT: decode against llama.cpp",
    "E2B int4_g128, LiteRT: decode against LiteRT-LM": (
        "E2B: our decode of the `.tflite` against LiteRT-LM's of the `.litertlm`"
    ),
    "E2B int4_g128: RssAnon in steady state": "E2B, ONNX Runtime: memory between answers",
    "E2B int4_g32, LiteRT: RssAnon in steady state": "E2B `int4_g32`, LiteRT: memory between answers",
    "E2B int4: prefill 512, decode 64, context 4096 under a kernel limit of 2 GiB": (
        "E2B `int4`, ONNX Runtime, under a kernel limit of 2 GiB"
    ),
    "E2B int4_g32, LiteRT: prefill 512, decode 64, context 4096 under a kernel limit of 2 GiB": (
        "E2B `int4_g32`, LiteRT, under a kernel limit of 2 GiB"
    ),
    "E2B int4_g128: 1 image and 30 s of audio, prefill at least 512, decode 64, context 4096 under a kernel "
    "limit of 2 GB": "E2B `int4_g128`, ONNX Runtime, with an image and 30 s of audio, under 2 GB",
    "E4B int4_g128: 1 image and 30 s of audio, prefill at least 512, decode 64, context 4096 under a kernel "
    "limit of 3 GB": "E4B `int4_g128`, ONNX Runtime, with an image and 30 s of audio, under 3 GB",
    "E2B int4: encode one 768x768 image, 2 threads": "E2B: encoding one image",
    "E2B int4: encode 30 s of audio, 2 threads": "E2B: encoding 30 s of audio",
    "Pocket int4: points lost against fp32": "Pocket `int4`: points of accuracy lost against fp32",
}


def render_table(records: Iterable[Head]) -> str:
    """The rows of all records as a markdown table, and the machines that they were measured on."""
    return _render([(row.row, row, machine) for row, machine in _latest(records)])


def render_highlights(records: Iterable[Head]) -> str:
    """The rows of `HIGHLIGHTS` that the records have, with the target that was set for each."""
    latest = {row.row: (row, machine) for row, machine in _latest(records)}
    return _render([(words, *latest[label]) for label, words in HIGHLIGHTS.items() if label in latest])


def _render(rows: Sequence[tuple[str, TableRow, str]]) -> str:
    lines = ["| | target | measured |", "|---|---|---|"]
    lines += [f"| {' | '.join(map(_cell, (words, row.bar, row.value)))} |" for words, row, _ in rows]
    if machines := list(dict.fromkeys(machine for _, _, machine in rows if machine)):
        lines += ["", f"Measured on {'; '.join(machines)}."]
    return "\n".join(lines)


def latest_rows(records: Iterable[Head]) -> list[TableRow]:
    """The rows that the table shows, in its order."""
    return [row for row, _ in _latest(records)]


def _latest(records: Iterable[Head]) -> list[tuple[TableRow, str]]:
    """Rows and machines; of rows with one label the latest, at the place where the first was."""
    latest: dict[str, tuple[str, TableRow, str]] = {}
    for record in records:
        for row in record.readme if isinstance(record, TableRecord) else ():
            if row.row not in latest or record.time >= latest[row.row][0]:
                latest[row.row] = (record.time, row, _machine(record))  # a key keeps its first place
    return [(row, machine) for _, row, machine in latest.values()]


def replace_block(text: str, name: str, content: str, path: Path) -> str:
    """The document's text with `content` between the markers of `name`.

    Raises:
        UsageError: the markers are missing, repeated or in the wrong order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end or begin in rest or end in before or end in after:
        raise UsageError(f"{path}: expected the lines {begin} and {end}, once each and in this order")
    return f"{before}{begin}\n{content}\n{end}{after}"


def update_documents(readme: Path, results: Sequence[Path], *, check: bool = False) -> bool:
    """Writes the tables and plots of `results` into `readme`, docs/results.md and docs/img.

    Returns:
        Whether a document or a plot was out of date.

    Raises:
        RecordError: a results file holds something other than records.
        GemmaEdgeError: with `check`, a document or a plot is out of date.
    """
    records = [record for path in results for record in read_records(path)]
    page, folder = readme.parent / PAGE, readme.parent / PLOTS
    plots = render_plots(records)
    block = render_table(records)
    if plots:
        block += "\n\n" + "\n".join(f"![{title}](img/{name})" for name, (title, _) in plots.items())
    blocks = {readme: {SHORT: render_highlights(records)}, page: {RESULTS: block}}
    quality = [record for record in records if isinstance(record, QualityRecord)]
    if recipes := [record for record in quality if not record.compares_methods]:
        latest = max(recipes, key=lambda record: record.time)
        blocks[page][QUALITY] = render_quality(latest.metrics)
    if methods := {record.name: record for record in quality if record.compares_methods}:
        blocks[page][METHODS] = render_methods(methods.values())
    files: dict[Path, str] = {path: path.read_text(encoding="utf-8") for path in folder.glob("*.svg")}
    wanted = {folder / name: svg for name, (_, svg) in plots.items()}
    for path, contents in blocks.items():
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        files[path] = wanted[path] = path.read_text(encoding="utf-8")
        for name, content in contents.items():
            wanted[path] = replace_block(wanted[path], name, content, path)
    stale = sorted(path for path in files | wanted if files.get(path) != wanted.get(path))
    if check and stale:
        raise GemmaEdgeError(f"{stale[0]}: not made from these results: run this without --check")
    for path in stale:
        if path in wanted:
            write_whole(path, wanted[path])
        else:
            path.unlink()
    return bool(stale)


def _machine(record: Head) -> str:
    machine = record.environment
    return f"{machine.cpu}, {machine.cores_usable} cores, {machine.kernel}" if machine.cpu else ""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
