"""The README's table of results, from the committed records and from nothing else.

    python -m gemma_edge.benchmarks.table benchmarks/results/*.jsonl --readme README.md [--check]

Every record carries its own rows. A row that several records have is taken from the latest of them, at the
place where it came first. `--check` writes nothing and fails when the README says something else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.record import read_records
from gemma_edge.benchmarks.script import run_script
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError

Json = dict[str, Any]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


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


def replace_table(text: str, table: str, path: Path) -> str:
    """The README's text with `table` between its markers. Raises UsageError when they are not there once."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before or END in after:
        raise UsageError(f"{path}: expected the lines {BEGIN} and {END}, once each and in this order")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def update_readme(readme: Path, results: Sequence[Path], *, check: bool = False) -> bool:
    """Writes the table of `results` into `readme`; returns whether it was another one.

    Raises:
        RecordError: a results file that is not one.
        GemmaEdgeError: with `check`, when the README's table is not that of the results.
    """
    if not readme.is_file():
        raise UsageError(f"{readme}: no such file")
    old = readme.read_text(encoding="utf-8")
    new = replace_table(old, render_table(r for path in results for r in read_records(path)), readme)
    if check and new != old:
        raise GemmaEdgeError(f"{readme}: the table is not that of the results: run this without --check")
    if new != old:
        readme.write_text(new, encoding="utf-8")
    return new != old


def _machine(record: Json) -> str:
    environment = record.get("environment") or {}
    if not environment.get("cpu"):
        return ""
    return f"{environment['cpu']}, {environment.get('cores_usable')} cores, {environment.get('kernel')}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m gemma_edge.benchmarks.table", description=summary)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSONL files of records")
    parser.add_argument("--readme", type=Path, required=True, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    args = parser.parse_args(argv)
    changed = update_readme(args.readme, args.results, check=args.check)
    print(f"{args.readme}: {'updated' if changed else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
