"""Write a checkpoint of published layout and shapes with random weights."""

from __future__ import annotations

import argparse

from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.synth.synth_gemma3n import SIZES
from gemma_edge.runtime.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `gemma-edge synth`."""
    parser.add_argument("path", help="the folder to create")
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="the model whose shapes to use (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same weights (default: 0)"
    )
    parser.add_argument("--text-only", action="store_true", help="use the layout of a text-only checkpoint")
    parser.add_argument(
        "--encoders",
        action="store_true",
        help="also write the image and audio encoders (1.9 GB for e2b and e4b)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `gemma-edge synth`; prints path and sizes."""
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must not be negative")
    if args.encoders and args.text_only:
        raise UsageError("--encoders: a text-only layout has no encoders")
    made = synthesize(
        args.path,
        args.size,
        seed=args.seed,
        multimodal_layout=not args.text_only,
        encoders=args.encoders,
    )
    print(f"{made.path}: {made.parameters:,} parameters, {made.bytes:,} bytes of bf16 weights")
    return 0
