"""List the bundles in a folder and below it.

Prints path, format, recipe, context, size and source of each, from its manifest alone: `gemma-edge inspect
--check` examines one. Hidden folders are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gemma_edge.cli.text_table import text_table
from gemma_edge.runtime.artifacts.bundle_list import find_bundles
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import UsageError, printable
from gemma_edge.runtime.units import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge list`."""
    parser.add_argument("folder", nargs="?", default=".", help="where to look (default: this folder)")
    parser.add_argument("--json", action="store_true", help="print the bundles as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints every bundle that is found."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    found = list(find_bundles(folder))
    if args.json:
        print(json.dumps([each.to_dict() for each in found]))
        return 0
    rows: list[tuple[str, ...]] = [("bundle", "format", "recipe", "context", "size", "source")]
    for each in found:
        context = "" if each.context is None else str(each.context)
        names = map(printable, (each.path, each.format, each.recipe))
        rows.append((*names, context, format_size(each.bytes), printable(each.source)))
    if found:
        print(text_table(rows))
    else:
        tell(f"{folder}: no bundle in it or below. `gemma-edge export` makes one.")
    return 0
