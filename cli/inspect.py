"""Show a bundle's parts, sizes and predicted memory."""

from __future__ import annotations

import argparse
import json

from gemma_edge.cli.bundle_options import add_words, take_bundle
from gemma_edge.export.bundle_description import agreement_lines, plan_lines
from gemma_edge.export.plan_table import NAMES
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import printable


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge inspect`."""
    add_words(parser)
    parser.add_argument("--check", action="store_true", help="hash every file and compare with the manifest")
    parser.add_argument("--json", action="store_true", help="print the same from the manifest as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints parts, bits, bytes, residency, predicted peak, and what the parity gate found."""
    bundle = Bundle.open(take_bundle(args, 0)[0])
    if args.check:
        with ProgressBar("checking hashes", sum(f.bytes for f in bundle.files.values()), True, "B") as bar:
            bundle.check_hashes(bar.advance)
    source = bundle.member("source", dict)
    if args.json:
        keys = (
            "format",
            "generator",
            "source",
            "recipe",
            "context",
            "chunk",
            "kv_cache",
            "plan",
            "modalities",
            "files",
        )
        print(json.dumps({k: bundle.manifest.get(k) for k in (*keys, "agreement")}))
        return 0
    for line in plan_lines(bundle):
        print(line)
    print(f"takes {', '.join(['text', *(NAMES[kind] for kind in bundle.modalities)])}")
    name, revision = printable(source.get("name")), printable(str(source.get("revision"))[:12])
    print(f"source {name} ({revision}), KV cache {bundle.kv_cache}")
    for line in agreement_lines(bundle):
        print(line)
    if args.check:
        print("every file has the recorded SHA-256")
    return 0
