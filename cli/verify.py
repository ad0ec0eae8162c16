"""Compare a bundle with its checkpoint.

Checks that the stored weights are the checkpoint's and that the engine computes what they say. Then runs both
on the same tokens and prints KL divergence, top-1 agreement, logit error and perplexity. Exit code 6 if a
check fails, or if the mean KL is above --max-kl.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gemma_edge.cli.bundle_options import add_max_kl, add_words, check_max_kl, take_bundle
from gemma_edge.cli.export import add_changes
from gemma_edge.export.gate.parity import DEFAULT_TEXT_TOKENS, check_quality, unusual, verify_bundle
from gemma_edge.export.part_costs import part_costs
from gemma_edge.export.weights.recipe import Bounds, load_recipe
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import BundleError, UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge verify`."""
    add_words(parser)
    parser.add_argument("--source", required=True, help="the checkpoint that the bundle was exported from")
    add_changes(parser)
    parser.add_argument("--text", metavar="FILE", help="use this text file instead of the built-in prompts")
    parser.add_argument(
        "--tokens",
        type=int,
        default=DEFAULT_TEXT_TOKENS,
        metavar="N",
        help="tokens of the text to use (default: 256)",
    )
    parser.add_argument(
        "--recipe", help="compare with what this recipe leads to expect (default: the bundle's own recipe)"
    )
    add_max_kl(parser)
    parser.add_argument(
        "--by-part",
        action="store_true",
        help="also print what the rounding of each part costs by itself: six more passes over the weights",
    )
    parser.add_argument("--json", action="store_true", help="print the measures as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what was checked and measured; exit code 6 when a check fails."""
    check_max_kl(args.max_kl)
    if args.tokens < 2:
        raise UsageError(f"--tokens must be 2 or more, not {args.tokens}")
    text = None
    if args.text:
        try:
            text = Path(args.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{args.text}: cannot be read as UTF-8 text: {error}") from None
    bundle, _ = take_bundle(args, 0)
    recipe = Bundle.open(bundle).member("recipe", dict)
    if args.recipe:
        bounds = load_recipe(args.recipe).bounds
    else:
        try:
            bounds = Bounds(**recipe["bounds"])
        except (KeyError, TypeError):
            raise BundleError(
                Path(bundle) / "manifest.json",
                "recipe.bounds",
                "the recipe's bounds",
                repr(recipe.get("bounds")),
            ) from None
    agreement = verify_bundle(
        bundle,
        args.source,
        text=text,
        max_tokens=args.tokens,
        progress=True,
        adapters=args.adapter,
        slice=args.slice,
    )
    costs = None
    if args.by_part:
        costs = part_costs(
            bundle,
            args.source,
            text=text,
            max_tokens=args.tokens,
            adapters=args.adapter,
            slice=args.slice,
            progress=True,
        )
    measures = agreement.to_dict() | ({} if costs is None else {"by_part": costs})
    print(json.dumps(measures) if args.json else agreement.summary())
    check_quality(agreement, bounds, args.max_kl)
    if not args.json:
        name = args.recipe or str(recipe.get("name", ""))
        print(agreement.in_words(name))
        if costs is not None:
            told = ", ".join(f"{part} {cost:.3g}" for part, cost in costs.items())
            print(f"each part rounded by itself, KL in nats: {told}")
        if warning := unusual(agreement, bounds):
            print(f"warning: {warning}", file=sys.stderr)
    return 0
