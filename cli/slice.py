"""Cut a smaller checkpoint out of one whose feed-forward layers are nested, as those of Gemma 3n E4B are.

Takes the first columns of the feed-forward layers, leaves layers out, and keeps encoders, tokenizer and
templates. The result is a checkpoint like any other. To export a slice without the copy on disk, use
`gemma-edge export --slice`.
"""

from __future__ import annotations

import argparse
import shlex

from gemma_edge.export.export_families import tensor_specs
from gemma_edge.export.model.model_slice import Slice, parse_layers, parse_widths
from gemma_edge.export.plan_table import format_count, needed_size
from gemma_edge.export.slicer import best_slice, slice_checkpoint
from gemma_edge.export.weights.recipe import DEFAULT_RECIPE
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import parse_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge slice`."""
    parser.add_argument("source", help="the checkpoint: a folder or a Hugging Face id")
    parser.add_argument("out", help="the folder to create")
    parser.add_argument("--config", metavar="NAME", help="a published slice, such as E2.54B")
    parser.add_argument(
        "--ffn",
        metavar="WIDTHS",
        help="the width of the feed-forward layers, or one for each layer that stays, such as "
        "8192x4,16384,8192x30 for 4 layers of 8192, one of 16384 and 30 of 8192",
    )
    parser.add_argument("--skip", metavar="LAYERS", help="layers to leave out, such as 20-24 or 3,20-24")
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help=f"the published slice that scores best among those whose export in {DEFAULT_RECIPE}, with all "
        "encoders and a context of 4096, needs no more memory than this, such as 2GiB",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the slice; prints its size."""
    given = [args.config, args.budget, args.ffn or args.skip]
    if sum(value is not None for value in given) != 1:
        raise UsageError("say what to take: --config NAME, --ffn WIDTHS and --skip LAYERS, or --budget SIZE")
    wanted = args.config
    if args.budget:
        chosen, plan = best_slice(args.source, parse_size(args.budget))
        wanted = str(chosen)
        tell(f"{wanted}: its export needs {needed_size(plan.needed_bytes)} in {plan.recipe}")
    elif wanted is None:
        widths = parse_widths(args.ffn) if args.ffn else ()
        wanted = str(Slice(widths, parse_layers(args.skip) if args.skip else ()))
    made = slice_checkpoint(args.source, args.out, wanted, progress=True)
    if quality := made.slice.quality:
        tell(f"{made.slice}: published MMLU of {quality['of']}: {quality['mmlu']} % ({quality['source']})")
    weights = format_count(sum(spec.size for spec in tensor_specs(made.config).values()))
    size = (
        f"{made.config.num_hidden_layers} layers, {weights} weights of the text model, {made.bytes:,} bytes"
    )
    print(f"{made.path}: {size}. Next: gemma-edge export {shlex.quote(args.out)} OUT")
    return 0
