"""Choose what to export for a device: slice, format, recipe, context and KV cache.

    gemma-edge plan google/gemma-3n-E4B-it --for pi5-2gb
    gemma-edge plan google/gemma-3n-E4B-it --device ssh://pi@raspberrypi.local
    gemma-edge plan ckpt/ --for phone-6gb --modalities text,image --context 8192

Prints a table of plans that fit, the best first, why the first is the best, and the command that exports it.
`gemma-edge export CKPT OUT --for NAME` exports it at once. No weight is read. With neither --for nor
--device, the plan is for this machine. --device installs gemma-edge on a board, as `bench` does, to measure
the bandwidth there.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gemma_edge.benchmarks.measure.planned_machine import asked_machine, known_machine, measured_speeds
from gemma_edge.cli.bundle_options import add_image_size
from gemma_edge.cli.device_options import LOCAL, add_device
from gemma_edge.cli.text_table import text_table
from gemma_edge.devices.known_devices import known_devices
from gemma_edge.devices.open_device import open_device
from gemma_edge.export.device_plans import MIN_SPEED, DevicePlan, Machine, Wishes, rank_plans
from gemma_edge.runtime.console import without_controls
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_size, parse_size

UNKNOWN, UNMEASURED = "not known", "not measured"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge plan`."""
    parser.add_argument("source", help="the checkpoint: a folder or a Hugging Face id")
    add_known_device(parser)
    add_device(parser, "ask this device for its memory, processor and bandwidth")
    parser.add_argument("--ceiling", metavar="SIZE", help="bytes of anonymous memory at most, such as 2GiB")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of KV cache (default: 4096, or fewer if they fit)"
    )
    parser.add_argument(
        "--modalities",
        metavar="LIST",
        help="inputs of the bundle, from text,image,audio (default: all that the checkpoint has)",
    )
    add_image_size(parser)
    parser.add_argument(
        "--min-quality", type=float, metavar="MMLU", help="published MMLU of a slice at least, in percent"
    )
    parser.add_argument(
        "--min-speed",
        type=float,
        default=MIN_SPEED,
        metavar="N",
        help="tokens a second at least, where a speed is known: plans below it come last (default: 5)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="show speeds that `gemma-edge bench -o FILE` has measured on this device",
    )
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")


def add_known_device(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds --for and --bundles; `more` says what else --for may name."""
    parser.add_argument(
        "--for",
        dest="known_device",
        metavar="NAME",
        help=f"plan for this device: {', '.join(known_devices())}{more}",
    )
    parser.add_argument(
        "--bundles",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="plan with the KL that the gate measured of this checkpoint's bundles in this folder, and with "
        "--calibrate none where it was measured; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the plans and the command of the first."""
    if args.known_device and args.device:
        raise UsageError("--for names a device that is known, --device one that is asked: give one of them")
    if args.min_quality is not None and not 0 <= args.min_quality <= 100:
        raise UsageError(f"--min-quality is a percentage from 0 to 100, not {args.min_quality:g}")
    if not args.min_speed >= 0:
        raise UsageError(f"--min-speed must be 0 or more, not {args.min_speed:g}")
    wishes = replace(wishes_of(args), min_quality=args.min_quality, min_speed=args.min_speed)
    speeds = measured_speeds(args.results) if args.results else {}
    if args.known_device:
        machine = known_machine(args.known_device)
    else:
        with open_device(args.device or LOCAL) as device:
            machine = asked_machine(device)
    machine = replace(machine, speeds=speeds)
    plans = rank_plans(args.source, machine, wishes, args.bundles)
    command = export_command(args, plans[0])
    if args.json:
        found = [_as_json(plan) for plan in plans]
        print(json.dumps({"machine": machine.name, "plans": found, "command": command}))
        return 0
    print(without_controls("\n".join(_lines(machine, wishes, plans))))
    print(f"\n{command}")
    return 0


def wishes_of(args: argparse.Namespace) -> Wishes:
    """What the options that `plan` and `export` share ask for."""
    modalities = None if args.modalities is None else [m.strip() for m in args.modalities.split(",")]
    ceiling = parse_size(args.ceiling) if args.ceiling else None
    return Wishes(args.context, modalities, ceiling, image_size=args.image_size)


def export_command(args: argparse.Namespace, plan: DevicePlan) -> str:
    """The command that exports a plan."""
    words = ["gemma-edge", "export", args.source, "OUT", *plan.options()]
    words += ["--modalities", args.modalities] if args.modalities else []
    words += ["--ceiling", args.ceiling] if args.ceiling else []
    words += ["--image-size", str(args.image_size)] if args.image_size else []
    return shlex.join(words)


def _lines(machine: Machine, wishes: Wishes, plans: Sequence[DevicePlan]) -> list[str]:
    head = ("slice", "format", "recipe", "KV cache", "context", "memory", "disk", "MMLU", "KL", "tok/s")
    rows = [head, *(_row(plan) for plan in plans)]
    return [machine.name, "", text_table(rows), "", *_reasons(wishes, plans)]


def _row(plan: DevicePlan) -> tuple[str, ...]:
    speed = UNKNOWN if plan.speed is None else f"{plan.speed:.1f}"
    return (
        str(plan.slice or "whole"),
        plan.plan.format,
        f"{plan.recipe.name}{', to the nearest' if plan.calibrate else ''}",
        plan.recipe.kv_cache,
        str(plan.plan.context),
        format_size(plan.memory_bytes),
        format_size(plan.plan.file_bytes),
        UNKNOWN if plan.mmlu is None else f"{plan.mmlu:g} %",
        UNMEASURED if plan.mean_kl is None else f"{plan.mean_kl:.3g}",
        speed if plan.measured or plan.speed is None else f"<= {speed}",
    )


def _reasons(wishes: Wishes, plans: Sequence[DevicePlan]) -> list[str]:
    """Why the first plan is the first, and what the columns are."""
    first = plans[0]
    if first.speed is not None and first.speed < wishes.min_speed:
        why = f"none of these can reach {wishes.min_speed:g} tokens a second; the first comes nearest"
    else:
        speed = "" if first.speed is None else f" and can reach {wishes.min_speed:g} tokens a second"
        best = "the recipe nearest the checkpoint" if first.mmlu is None else "the slice with the best MMLU"
        why = f"of the plans that fit{speed}, the first has {best}"
    notes = [f"{why}."]
    if any(plan.mmlu is not None for plan in plans):
        notes.append("MMLU: published, of the pre-trained model before quantization; not measured here.")
    if any(plan.mean_kl is None for plan in plans):
        notes.append("KL: what a recipe costs this checkpoint; `export` and `verify` measure it (--bundles).")
    if any(plan.speed is not None and not plan.measured for plan in plans):
        notes.append("tok/s: bandwidth over the bytes of a step with a full context; engines reach less.")
    return notes


def _as_json(plan: DevicePlan) -> dict[str, object]:
    return {
        "slice": str(plan.slice) if plan.slice else None,
        "format": plan.plan.format,
        "recipe": plan.recipe.name,
        "kv_cache": plan.recipe.kv_cache,
        "calibrate": plan.calibrate,
        "context": plan.plan.context,
        "memory_bytes": plan.memory_bytes,
        "file_bytes": plan.plan.file_bytes,
        "mmlu": plan.mmlu,
        "mean_kl": plan.mean_kl,
        "tokens_per_second": plan.speed,
        "speed_measured": plan.measured,
        "options": plan.options(),
    }
