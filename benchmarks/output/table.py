"""The README's tables of results and its plots, from the committed records and from nothing else.

    python -m gemma_edge.benchmarks.output.table benchmarks/results/*.jsonl --readme README.md [--check]

Every record carries its own rows. A row that several records have is taken from the latest of them, at the
place where it came first. The latest record of `quality` makes a table of its own. The plots (`plots.py`) are
SVG files in docs/img beside the README, where nothing else is. `--check` writes nothing and fails when README
or plots say something else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.output.plots import render_plots
from gemma_edge.benchmarks.output.quality_table import render_quality
from gemma_edge.benchmarks.output.record import read_records
from gemma_edge.benchmarks.script import run_script
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError

Json = dict[str, Any]
PLOTS = "docs/img"
RESULTS, QUALITY = "results", "quality"  # the blocks of the README, between comments with :begin and :end


def render_table(records: Iterable[Json]) -> str:
    """The rows of all records as a markdown table, and the machines that they were measured on."""
    latest = _latest(records)
    lines = ["| what | bar | measured |", "|---|---|---|"]
    for row, _ in latest:
        lines.append("| " + " | ".join(_cell(row[key]) for key in ("row", "bar", "value")) + " |")
    machines = list(dict.fromkeys(machine for _, machine in latest if machine))
    if machines:
        lines += ["", f"Measured on {'; '.join(machines)}."]
    return "\n".join(lines)


def latest_rows(records: Iterable[Json]) -> list[Json]:
    """The rows that the table shows, in its order: objects with row, bar and value."""
    return [row for row, _ in _latest(records)]


def _latest(records: Iterable[Json]) -> list[tuple[Json, str]]:
    """Rows and machines; of rows with one label the latest, at the place where the first was."""
    latest: dict[str, tuple[str, Json, str]] = {}
    for record in records:
        for row in record.get("readme", []):
            label = row["row"]
            if label not in latest or record["time"] >= latest[label][0]:
                latest[label] = (record["time"], row, _machine(record))  # a key keeps its first place
    return [(row, machine) for _, row, machine in latest.values()]


def replace_block(text: str, name: str, content: str, path: Path) -> str:
    """The README's text with `content` between the markers of `name`.

    Raises:
        UsageError: they are not there, once each.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end or begin in rest or end in before or end in after:
        raise UsageError(f"{path}: expected the lines {begin} and {end}, once each and in this order")
    return f"{before}{begin}\n{content}\n{end}{after}"


def update_readme(readme: Path, results: Sequence[Path], *, check: bool = False) -> bool:
    """Writes the table and the plots of `results` into `readme` and docs/img beside it.

    Returns:
        Whether one of them was another one.

    Raises:
        RecordError: a results file that is not one.
        GemmaEdgeError: with `check`, when README or plots are not those of the results.
    """
    if not readme.is_file():
        raise UsageError(f"{readme}: no such file")
    records = [record for path in results for record in read_records(path)]
    plots = render_plots(records)
    folder = readme.parent / PLOTS
    wanted = {folder / name: svg for name, (_, svg) in plots.items()}
    files = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.svg"))}
    block = render_table(records)
    if plots:
        block += "\n\n" + "\n".join(f"![{title}]({PLOTS}/{name})" for name, (title, _) in plots.items())
    old = readme.read_text(encoding="utf-8")
    new = replace_block(old, RESULTS, block, readme)
    if quality := [record for record in records if record["kind"] == QUALITY]:
        latest = max(quality, key=lambda record: str(record["time"]))
        new = replace_block(new, QUALITY, render_quality(latest["metrics"]), readme)
    if check and new != old:
        raise GemmaEdgeError(f"{readme}: the table is not that of the results: run this without --check")
    if check and wanted != files:
        path = next(path for path in {**wanted, **files} if wanted.get(path) != files.get(path))
        raise GemmaEdgeError(f"{path}: the plot is not that of the results: run this without --check")
    if new != old:
        readme.write_text(new, encoding="utf-8")
    for path in files.keys() - wanted.keys():
        path.unlink()
    for path, svg in wanted.items():
        if files.get(path) != svg:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(svg, encoding="utf-8")
    return new != old or wanted != files


def _machine(record: Json) -> str:
    environment = record.get("environment") or {}
    if not environment.get("cpu"):
        return ""
    return f"{environment['cpu']}, {environment.get('cores_usable')} cores, {environment.get('kernel')}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m gemma_edge.benchmarks.output.table", description=summary)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSONL files of records")
    parser.add_argument("--readme", type=Path, required=True, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    args = parser.parse_args(argv)
    changed = update_readme(args.readme, args.results, check=args.check)
    print(f"{args.readme}: {'updated' if changed else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
