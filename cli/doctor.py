"""Look over a machine: what runs on it, what is slow or missing, and what to do about it.

    gemma-edge doctor                                  this machine
    gemma-edge doctor --device ssh://pi@raspberrypi    a board; nothing is installed there
    gemma-edge doctor out/                             does this bundle fit?
    gemma-edge doctor google/gemma-3n-E2B-it --device ssh://pi
                                                       which exports would fit?

Each line is ok, slow or missing, with the remedy. Ends with 4 when something is missing that keeps gemma-edge
from running, else with 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace

from gemma_edge.cli.device_options import LOCAL, add_device
from gemma_edge.cli.exported_once import is_checkpoint
from gemma_edge.devices.base import DeviceFacts
from gemma_edge.devices.doctor import ENGINES, Finding, cannot_install, examine, judge_need
from gemma_edge.devices.open_device import open_device
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.console import without_controls
from gemma_edge.runtime.errors import BundleError, CeilingError, DeviceError
from gemma_edge.runtime.units import format_size

RECIPES = 3  # of which the best plan is shown


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge doctor`."""
    parser.add_argument(
        "model", nargs="?", metavar="BUNDLE|CKPT", help="say whether this fits, or what would"
    )
    add_device(parser, "look over this device instead of this machine")
    parser.add_argument("--json", action="store_true", help="print facts and findings as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints one finding a line.

    Raises:
        UsageError, DeviceError: as `open_device`.
        BundleError: the bundle is damaged.
    """
    spec = args.device or LOCAL
    with open_device(spec) as device:
        facts = device.facts
    if spec == LOCAL:
        facts = replace(facts, packages=_packages_here())
    findings = [*examine(facts), *([] if args.model is None else fits(facts, args.model))]
    if args.json:
        print(json.dumps({"facts": asdict(facts), "findings": [asdict(each) for each in findings]}))
    else:
        for finding in findings:
            print(without_controls(finding.line()))
    return DeviceError.exit_code if cannot_install(facts) else 0


def fits(facts: DeviceFacts, model: str) -> Iterator[Finding]:
    """Whether a bundle fits into a machine's memory, or which exports of a checkpoint do, the best first.

    Raises:
        BundleError, CheckpointError, ConfigError: the model cannot be read.
    """
    if not is_checkpoint(model):
        bundle = Bundle.open(model)
        needed = bundle.member("plan", dict).get("needed_bytes")
        if not isinstance(needed, int):
            raise BundleError(bundle.path, "plan.needed_bytes", "bytes", needed)
        remedy = "export with a shorter --context or fewer bits: `gemma-edge doctor CKPT` says which fit"
        yield judge_need(facts, f"{bundle.path.name}, context {bundle.context},", needed, remedy)
        return
    # A board that runs bundles has no exporter.
    from gemma_edge.benchmarks.measure.planned_machine import described_machine
    from gemma_edge.export.device_plans import Wishes, rank_plans

    try:
        plans = rank_plans(model, described_machine(facts), Wishes())
    except CeilingError as error:
        remedy = "end other programs, or take a machine with more memory"
        yield Finding("fits", "missing", str(error), remedy)
        return
    best = {plan.recipe.name: plan for plan in reversed(plans)}
    shown = [plan for plan in plans if plan is best[plan.recipe.name]][:RECIPES]
    for plan in shown:
        yield Finding("fits", "ok", f"{' '.join(plan.options())}: {format_size(plan.memory_bytes)}")
    if len(plans) > len(shown):
        remedy = f"see all with `{shlex.join(['gemma-edge', 'plan', model, '--device', facts.spec])}`"
        yield Finding("fits", "ok", f"{len(plans) - len(shown)} more plans", remedy)


def _packages_here() -> tuple[tuple[str, str], ...]:
    """The engines that this interpreter imports."""
    found = []
    for name in ENGINES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)
