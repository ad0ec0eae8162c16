"""Fetch a published bundle from a model hub.

    gemma-edge pull owner/name
    gemma-edge pull owner/name/int4@v1.0 out/
    gemma-edge pull https://huggingface.co/owner/name

Only the files that the bundle's manifest lists are fetched, and its model card. Their sizes are checked
before they come, their hashes after. After an interruption, the same command goes on where it stopped.
Nothing that comes is run, and no bundle or file that is there is replaced.
"""

from __future__ import annotations

import argparse
import json
import shlex

from gemma_edge.runtime.console import ProgressLine, tell
from gemma_edge.runtime.hub.pull_bundle import Pulled, pull_bundle
from gemma_edge.runtime.units import format_size

EXAMPLE = "Why is the sky blue?"  # for a bundle that names no example of its own


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge pull`."""
    parser.add_argument(
        "id", help="the bundle: owner/name, owner/name/folder, owner/name@revision, or the URL of its page"
    )
    parser.add_argument("folder", nargs="?", help="where to put it (default: its name, in this folder)")
    parser.add_argument("--json", action="store_true", help="print path, commit and bytes fetched as JSON")


def run(args: argparse.Namespace) -> int:
    """Fetches the bundle; says where it is."""
    done = pull_shown(args.id, args.folder)
    if args.json:
        print(json.dumps({"path": str(done.path), "commit": done.commit, "fetched": done.fetched}))
        return 0
    out = args.folder or done.path.name
    tell(f"{args.id} is at commit {done.commit}: fetched {format_size(done.fetched)}, every hash is right")
    print(f"{out}: ready. Next: gemma-edge run {shlex.quote(out)} {shlex.quote(done.example or EXAMPLE)}")
    return 0


def pull_shown(address: str, folder: str | None) -> Pulled:
    """`pull_bundle`, its progress on a terminal's stderr."""
    line = ProgressLine()

    def show(there: int, total: int) -> None:
        line.show(f"{address}: {format_size(there)} of {format_size(total)}")

    try:
        return pull_bundle(address, folder, progress=show)
    finally:
        line.clear()
