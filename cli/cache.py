"""Show, bound or empty the cache: packed weights, parts of `.litertlm` files, prefixes, encoded attachments.

    gemma-edge cache                    what is kept, and when it was last used
    gemma-edge cache --pack out/        pack a bundle's weights for this CPU now; later loads map them
    gemma-edge cache --limit 4GiB       keep at most so much: the least recently used files go
    gemma-edge cache --clear            remove all of it

The runtime makes these files again when it needs them. Only --pack makes the packed weights of ONNX bundles:
they take twice the size of the weights on disk, so that a load takes less memory and time.
$GEMMA_EDGE_CACHE names another folder and $GEMMA_EDGE_CACHE_LIMIT another limit. What `bench` keeps for
devices, the bundles that `run` exported, and what `tune` found lie in folders beside them and stay.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines.engine_registry import engine_of
from gemma_edge.runtime.files.cache_folder import cache_folder, cache_limit, set_cache_limit
from gemma_edge.runtime.files.kept_files import clear, kept_files, prune
from gemma_edge.runtime.units import format_size, parse_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge cache`."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--clear", action="store_true", help="remove every kept file")
    action.add_argument("--limit", metavar="SIZE", help="remember this limit, and remove what is beyond it")
    action.add_argument("--pack", metavar="BUNDLE", type=Path, help="keep this bundle's packed weights")
    parser.add_argument("--json", action="store_true", help="print folder, limit and files as JSON")


def run(args: argparse.Namespace) -> int:
    """Packs, clears, or sets the limit, where asked to; prints what is kept."""
    removed = 0
    if args.pack:
        bundle = Bundle.open(args.pack)
        engine_of(bundle.format).pack_weights(bundle)
    elif args.clear:
        removed = clear()
    elif args.limit:
        set_cache_limit(parse_size(args.limit))
        removed = prune(cache_limit())
    folder, limit, files = cache_folder(), cache_limit(), kept_files()
    if args.json:
        rows = [{"name": file.path.name, "bytes": file.bytes, "used": file.used} for file in files]
        print(json.dumps({"folder": str(folder), "limit": limit, "removed": removed, "files": rows}))
        return 0
    for file in files:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used))
        print(f"{format_size(file.bytes):>10}  {used}  {file.path.name}")
    total = format_size(sum(file.bytes for file in files))
    print(
        f"{folder}: {total} of at most {format_size(limit)}"
        + (f", {format_size(removed)} removed" * bool(removed))
    )
    return 0
