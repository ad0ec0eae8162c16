"""Publish a bundle on a model hub, with a model card.

The card states base model, licence, recipe, plan and what the parity gate measured, from the bundle's
manifest; `--results` adds the table of a file that `gemma-edge bench -o` wrote. `--dry-run` prints the card
and sends nothing. A card without the line "written by gemma-edge push" is yours, and stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gemma_edge.benchmarks.output.result_text import to_markdown
from gemma_edge.benchmarks.records.results_file import read_records
from gemma_edge.cli.bundle_options import add_words, take_bundle
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.sharing.model_card import model_card
from gemma_edge.export.sharing.push_bundle import push_bundle
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.hub.hub_address import HubAddress
from gemma_edge.runtime.units import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge push`."""
    add_words(parser, "ID", "then owner/name, or owner/name/folder for one of several")
    parser.add_argument(
        "--license", metavar="ID", help="licence of the weights (default: what the checkpoint's card stated)"
    )
    parser.add_argument(
        "--base-model", metavar="ID", help="the checkpoint on the hub (default: the id it was exported by)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="add this JSONL of `bench -o` to the card"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the card and the files, and send nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Publishes the bundle; prints its page."""
    path, words = take_bundle(args, 1)
    if len(words) != 1:
        raise UsageError("name the repository: gemma-edge push BUNDLE owner/name")
    address = HubAddress.parse(words[0])
    bundle = Bundle.open(path)
    results = to_markdown(read_records(args.results)) if args.results else ""
    card = model_card(bundle, str(address), license=args.license, base_model=args.base_model, results=results)
    sizes = {each.name: each.stat().st_size for each in bundle.paths()}
    if args.dry_run:
        print(card)
        tell(f"{len(sizes)} files, {format_size(sum(sizes.values()))}: nothing was sent")
        return 0
    with ProgressBar("checking hashes", sum(sizes.values()), True, "B") as bar:
        done = push_bundle(
            path, address, card, private=args.private, message=args.message, progress=bar.advance
        )
    if done.card_kept:
        tell(f"{address.id} has a README.md of its own, which stays")
    print(f"{done.url}: published {path}. Others get it by: gemma-edge pull {address}")
    return 0
