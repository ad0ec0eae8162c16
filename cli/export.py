"""Export a checkpoint to a quantized bundle.

Prints the plan, streams the weights, compares the bundle with the checkpoint, and publishes it if they
agree. Exit code 6 if they do not; nothing is published then.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from gemma_edge.benchmarks.measure.export_cost import record_export
from gemma_edge.benchmarks.measure.planned_machine import known_machine
from gemma_edge.cli.bundle_options import add_image_size, add_max_kl, check_max_kl
from gemma_edge.cli.device_options import BEHIND_SSH, LOCAL, is_tunable
from gemma_edge.cli.plan import add_known_device, wishes_of
from gemma_edge.cli.text_table import text_table
from gemma_edge.export.checkpoint.checkpoint import revision_of
from gemma_edge.export.device_plans import rank_plans
from gemma_edge.export.exporter import (
    DEFAULT_CHUNK,
    DEFAULT_CONTEXT,
    describe_source,
    export_bundle,
    export_job,
    replaced_by,
    resolve_recipe,
)
from gemma_edge.export.formats.export_format import ExportFormat, ExportJob
from gemma_edge.export.formats.registry import FORMAT_NAMES, export_format, format_of_target
from gemma_edge.export.gate.parity import unusual
from gemma_edge.export.plan import check_ceiling, make_plan
from gemma_edge.export.plan_table import format_plan
from gemma_edge.export.precision_budget import budget_name, choice_rows
from gemma_edge.export.weights.calibration_text import NONE, read_calibration
from gemma_edge.export.weights.recipe import DEFAULT_RECIPE, KV_CACHES, Recipe
from gemma_edge.runtime.artifacts.bundle_list import peek_manifest
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.tuned_settings import tuned_settings
from gemma_edge.runtime.units import as_bytes, parse_size

EXAMPLE = "Why is the sky blue?"  # for a checkpoint that names no example of its own


OUT_HELP = "the bundle to write: a folder or a .litertlm (not needed with --dry-run)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge export`."""
    parser.add_argument("source", help="the checkpoint: a folder or a Hugging Face id")
    parser.add_argument("out", nargs="?", help=OUT_HELP)
    add_export_options(parser)


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The options beside the two paths, which `optimum-cli export gemma-edge` has too."""
    parser.add_argument(
        "--format",
        action="append",
        choices=FORMAT_NAMES,
        help="onnx for ONNX Runtime (default), tflite for LiteRT, litertlm for one file that Google's "
        "LiteRT-LM runs (default for an OUT that ends so); repeatable, then OUT holds one bundle per format",
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"a recipe or a .json file (default: {DEFAULT_RECIPE})"
    )
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="bytes of weights that decoding a token may read at most, such as 1.3GiB: each layer gets 4 or "
        "8 bits by what its rounding is measured to cost; the recipe says the rest",
    )
    add_known_device(parser, f"; or the quickest that `gemma-edge tune` found for {LOCAL} or {BEHIND_SSH}")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens of KV cache (default: {DEFAULT_CONTEXT}, or the model's maximum if smaller)",
    )
    parser.add_argument(
        "--chunk", type=int, default=DEFAULT_CHUNK, metavar="N", help="tokens per prefill call (default: 128)"
    )
    parser.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        help="precision of the KV cache (default: the recipe's, but fp32 for tflite)",
    )
    parser.add_argument(
        "--modalities",
        metavar="LIST",
        help="inputs of the bundle, from text,image,audio (default: all that the checkpoint has)",
    )
    add_image_size(parser)
    add_changes(parser)
    parser.add_argument("--ceiling", metavar="SIZE", help="refuse a plan above this size, such as 2GiB")
    parser.add_argument(
        "--snapshots",
        metavar="SIZE",
        help="memory that the plan counts for KV snapshots of other conversations (default: none)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    parser.add_argument(
        "--force", action="store_true", help="replace a bundle of another checkpoint or recipe, too"
    )
    parser.add_argument("--no-verify", action="store_true", help="publish without the gate")
    add_max_kl(parser)
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="round 4-bit weights so that their errors cancel on a text: a file like what the model will "
        "meet, or auto for a built-in one (default); none rounds to the nearest",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="append the export's time and memory to this JSONL file"
    )
    parser.add_argument("--json", action="store_true", help="print the plan and the result as JSON")


def add_changes(parser: argparse.ArgumentParser) -> None:
    """The adapters that are merged into the checkpoint, and the slice that is taken of it."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="LORA",
        help="merge this LoRA adapter, a folder that PEFT wrote or a Hugging Face id; LORA=0.5 takes half of "
        "it; repeatable",
    )
    parser.add_argument(
        "--slice",
        metavar="NAME",
        help="take this slice of a model with nested FFNs: a published one such as E2.54B, or "
        "ffn=WIDTHS/skip=LAYERS, see `gemma-edge slice`",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the plan, exports, prints how well the bundle agrees."""
    check_max_kl(args.max_kl)
    read_calibration(args.calibrate or NONE)
    if args.max_kl is not None and args.no_verify:
        raise UsageError("--max-kl needs the gate: leave out --no-verify")
    if not args.dry_run and args.out is None:
        raise UsageError("name the folder of the bundle: gemma-edge export SOURCE OUT")
    if args.budget and args.dry_run:
        raise UsageError("--dry-run reads no weights, and --budget measures them: leave out one of them")
    if args.known_device:
        _plan_for_device(args)
    elif args.bundles:
        raise UsageError("--bundles is for --for: name a device that the export is planned for")
    args.recipe = args.recipe or DEFAULT_RECIPE
    given = list(dict.fromkeys(args.format or [None]))
    formats = [export_format(format_of_target(args.out, name)) for name in given]
    modalities = None if args.modalities is None else [m.strip() for m in args.modalities.split(",")]
    config, towers = describe_source(args.source, modalities, args.adapter, args.slice, args.image_size)
    jobs = []
    for format in formats:
        recipe = resolve_recipe(args.recipe, args.kv_cache, format.runtime.name)
        snapshots = as_bytes(args.snapshots or 0)
        jobs.append(export_job(config, recipe, args.context, args.chunk, towers, snapshots))
    targets = [_target(args.out, format, len(formats) == 1) for format in formats]
    if not args.dry_run:
        _check_targets(args, [_budgeted(args, job.recipe) for job in jobs], targets)
    for job, format, out in zip(jobs, formats, targets, strict=True):
        _run_format(args, job, format, modalities, out)
    return 0


def _budgeted(args: argparse.Namespace, recipe: Recipe) -> Recipe:
    """A recipe of the name that the bundle's will have."""
    return replace(recipe, name=budget_name(recipe, parse_size(args.budget))) if args.budget else recipe


def _plan_for_device(args: argparse.Namespace) -> None:
    """Sets the options for the device that --for names: those of its first plan, or tuned ones."""
    tuned = is_tunable(args.known_device)
    for option in ("format", "recipe", "budget") + (() if tuned else ("kv_cache", "slice")):
        if getattr(args, option):
            raise UsageError(f"--for chooses --{option.replace('_', '-')}: leave out one of them")
    if tuned:
        _take_tuned(args)
        return
    first = rank_plans(args.source, known_machine(args.known_device), wishes_of(args), args.bundles)[0]
    tell(f"{args.known_device}: {' '.join(first.options())}; `gemma-edge plan` explains the choice")
    args.format, args.recipe = [first.plan.format], first.recipe.name
    args.kv_cache, args.context = first.recipe.kv_cache, first.plan.context
    args.slice = str(first.slice) if first.slice else None
    args.calibrate = args.calibrate or first.calibrate


def _take_tuned(args: argparse.Namespace) -> None:
    """Sets the format and recipe that `gemma-edge tune` found quickest where --for says."""
    place = None if args.known_device == LOCAL else args.known_device
    found = tuned_settings(revision_of(args.source), place)
    if found is None or not (found.format and found.recipe):
        there = f"gemma-edge tune {args.source}" + (f" --device {place}" if place else "")
        raise UsageError(f"--for {args.known_device}: nothing was tuned there for {args.source}: run {there}")
    tell(f"{args.known_device}: --format {found.format} --recipe {found.recipe}, tuned {found.time}")
    args.format, args.recipe = [found.format], found.recipe


def _check_targets(args: argparse.Namespace, recipes: Sequence[Recipe], targets: Sequence[str]) -> None:
    """Refuses what must not be replaced, before anything is written; tells what will be."""
    if len(targets) > 1 and peek_manifest(Path(args.out)) is not None:
        raise UsageError(
            f"{args.out} is a bundle, and several formats need a folder for theirs: name another"
        )
    found = [
        replaced_by(args.source, out, recipe, force=args.force, adapters=args.adapter, slice=args.slice)
        for recipe, out in zip(recipes, targets, strict=True)
    ]
    for out, old in zip(targets, found, strict=True):
        if old:
            tell(f"{out}: replaces {old}")


def _target(out: str | None, format: ExportFormat, only: bool) -> str:
    """Where a format goes: inside OUT when there are several, and for a file unless OUT has its suffix."""
    if out is None or (only and out.endswith(format.runtime.suffix)):
        return out or ""
    runtime = format.runtime
    return str(Path(out) / (f"model{runtime.suffix}" if runtime.suffix else runtime.name))


def _planned(args: argparse.Namespace, job: ExportJob, format: ExportFormat, ceiling: int | None) -> bool:
    """Prints and checks the plan; whether that is all."""
    plan = make_plan(job, format)
    if not args.json:
        print(format_plan(plan.to_dict()), file=sys.stdout if args.dry_run else sys.stderr)
    if ceiling is not None:
        check_ceiling(plan, ceiling, job, format)
    if args.dry_run and args.json:
        print(json.dumps(plan.to_dict()))
    return bool(args.dry_run)


def _run_format(
    args: argparse.Namespace,
    job: ExportJob,
    format: ExportFormat,
    modalities: Collection[str] | None,
    out: str,
) -> None:
    ceiling = parse_size(args.ceiling) if args.ceiling else None
    if not args.budget and _planned(args, job, format, ceiling):
        return
    export = partial(
        export_bundle,
        args.source,
        out,
        recipe=job.recipe,
        context=job.context,
        chunk=args.chunk,
        ceiling=ceiling,
        verify=not args.no_verify,
        progress=True,
        format=format.runtime.name,
        modalities=modalities,
        force=args.force,
        snapshots=job.snapshots,
        adapters=args.adapter,
        max_kl=args.max_kl,
        calibrate=args.calibrate,
        slice=args.slice,
        image_size=args.image_size,
        budget=parse_size(args.budget) if args.budget else None,
    )
    result = record_export(export, args.record) if args.record else export()
    if args.json:
        agreement = result.agreement.to_dict() if result.agreement else None
        print(json.dumps({"path": str(result.path), "plan": result.plan.to_dict(), "agreement": agreement}))
        return
    if result.choices:
        tell(f"{text_table(list(choice_rows(result.choices)))}\n{format_plan(result.plan.to_dict())}")
    if result.agreement:
        tell(result.agreement.summary())
        tell(result.agreement.in_words(job.recipe.name))
        if told := unusual(result.agreement, job.recipe.bounds):
            tell(f"warning: {told}")
    print(f"{out}: ready. Next: gemma-edge run {shlex.quote(out)} {shlex.quote(result.example or EXAMPLE)}")
