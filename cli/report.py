"""Show results as one HTML page, or write them into documents.

    gemma-edge report benchmarks/results/*.jsonl -o report.html
    gemma-edge report results.jsonl -o report.html --png report.png --md report.md
    gemma-edge report benchmarks/results/*.jsonl --readme README.md --check

The page is one file that needs no network, light or dark as the reader's system is. `--png` takes a picture
of it with Chromium or Chrome. `--readme` writes the tables and plots of the records into README.md and
docs/results.md instead; with `--check` it writes nothing, and fails if a document is out of date.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gemma_edge.benchmarks.output.browser import screenshot
from gemma_edge.benchmarks.output.report import render_page
from gemma_edge.benchmarks.output.result_text import to_markdown
from gemma_edge.benchmarks.output.table import update_documents
from gemma_edge.benchmarks.records.results_file import read_records
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.whole_file import write_whole


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSONL files of results")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page (default: report.html)",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="take a picture of the page too")
    parser.add_argument("--dark", action="store_true", help="take the picture in dark")
    parser.add_argument("--md", type=Path, metavar="FILE", help="write the tables as markdown too")
    documents = parser.add_argument_group("documents instead of a page")
    documents.add_argument(
        "--readme", type=Path, metavar="FILE", help="write the tables and plots of README and docs/results.md"
    )
    documents.add_argument("--check", action="store_true", help="fail instead of writing")


def run(args: argparse.Namespace) -> int:
    """The verb.

    Raises:
        RecordError: a file holds something other than results.
        DeviceError: `--png` without a browser.
        GemmaEdgeError: `--check`, and a document is out of date.
    """
    if args.check and not args.readme:
        raise UsageError("--check is for --readme")
    if args.readme:
        changed = update_documents(args.readme, args.results, check=args.check)
        print(f"{args.readme}: {'updated' if changed else 'up to date'}")
        return 0
    records = [record for path in args.results for record in read_records(path)]
    if not records:
        raise UsageError(f"{', '.join(map(str, args.results))}: no results")
    write_whole(args.output, render_page(records))
    print(args.output)
    if args.md:
        newest_last = sorted(records, key=lambda record: record.time)
        write_whole(args.md, to_markdown(newest_last))
        print(args.md)
    if args.png:
        screenshot(args.output, args.png, dark=args.dark)
        print(args.png)
    return 0
