"""Turn a checkpoint into a bundle."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from gemma_edge.export.checkpoint.towers import Encoder
from gemma_edge.export.exporter import (
    DEFAULT_CHUNK,
    DEFAULT_CONTEXT,
    SUFFIX,
    describe_source,
    export_bundle,
    plan_export,
    resolve_recipe,
)
from gemma_edge.export.plan import check_ceiling
from gemma_edge.export.plan_table import format_plan
from gemma_edge.runtime.artifacts.bundle import FORMATS
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.units import parse_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge export`."""
    parser.add_argument("source", help="checkpoint folder, or a Hugging Face id")
    parser.add_argument(
        "out", nargs="?", help="folder of the bundle, or a .litertlm (not needed with --dry-run)"
    )
    parser.add_argument(
        "--format",
        action="append",
        choices=FORMATS,
        help="onnx for ONNX Runtime (default), tflite for LiteRT, litertlm for one file that Google's "
        "LiteRT-LM runs; given several times, each is made inside OUT",
    )
    parser.add_argument(
        "--recipe", default="int4", metavar="NAME", help="recipe name or .json file (default: int4)"
    )
    parser.add_argument(
        "--context", type=int, default=DEFAULT_CONTEXT, metavar="N", help="tokens of KV cache (4096)"
    )
    parser.add_argument(
        "--chunk", type=int, default=DEFAULT_CHUNK, metavar="N", help="tokens a prefill call (128)"
    )
    parser.add_argument(
        "--kv-cache", choices=("fp32", "int8"), help="precision of the KV cache (the recipe's)"
    )
    parser.add_argument(
        "--modalities",
        metavar="LIST",
        help="what the bundle takes, of text,image,audio (default: all that the checkpoint has)",
    )
    parser.add_argument("--ceiling", metavar="SIZE", help="refuse a plan that needs more memory, e.g. 2GiB")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--no-verify", action="store_true", help="publish without the parity gate")
    parser.add_argument("--json", action="store_true", help="print the plan and the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the plan, exports, prints how well the bundle agrees."""
    if not args.dry_run and args.out is None:
        raise UsageError("name the folder of the bundle: gemma-edge export SOURCE OUT")
    formats = list(dict.fromkeys(args.format or [FORMATS[0]]))
    modalities = None if args.modalities is None else [m.strip() for m in args.modalities.split(",")]
    config, encoders = describe_source(args.source, modalities)
    for format in formats:
        out = _target(args.out, format, len(formats) == 1)
        _run_format(args, config, encoders, modalities, format, out)
    return 0


def _target(out: str | None, format: str, only: bool) -> str | None:
    """Where a format goes: a folder of its own when there are several; a .litertlm is a file."""
    if out is None or (only and (format != "litertlm" or out.endswith(SUFFIX))):
        return out
    return str(Path(out) / (f"model{SUFFIX}" if format == "litertlm" else format))


def _run_format(
    args: argparse.Namespace,
    config: Gemma3nConfig,
    encoders: Mapping[Kind, Encoder],
    modalities: Collection[str] | None,
    format: str,
    out: str | None,
) -> None:
    recipe = resolve_recipe(args.recipe, args.kv_cache, format)
    ceiling = parse_size(args.ceiling) if args.ceiling else None
    plan = plan_export(config, recipe, args.context, args.chunk, format, encoders)
    if not args.json:
        print(format_plan(plan.to_dict()), file=sys.stdout if args.dry_run else sys.stderr)
    if ceiling is not None:
        check_ceiling(plan, ceiling, config, recipe, encoders)
    if args.dry_run or out is None:
        if args.json:
            print(json.dumps(plan.to_dict()))
        return
    result = export_bundle(
        args.source,
        out,
        recipe=recipe,
        context=args.context,
        chunk=args.chunk,
        ceiling=ceiling,
        verify=not args.no_verify,
        progress=True,
        format=format,
        modalities=modalities,
    )
    if args.json:
        agreement = result.agreement.to_dict() if result.agreement else None
        print(json.dumps({"path": str(result.path), "plan": plan.to_dict(), "agreement": agreement}))
        return
    if result.agreement:
        print(result.agreement.summary(), file=sys.stderr)
    print(f'{out}: ready. Next: gemma-edge run {out} "Hello"')
