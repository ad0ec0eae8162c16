"""Find the settings with which bundles are the quickest on a machine, and keep them for it.

    gemma-edge tune out/                                 threads and prefill chunk of a bundle
    gemma-edge tune onnx/ tflite/                        of several, and which of them is the quickest
    gemma-edge tune ckpt/ --recipe int4 --recipe int8    a checkpoint, exported for the time that takes
    gemma-edge tune out/ --device ssh://pi@raspberrypi
    gemma-edge tune out/ --forget

All settings are measured in turn, for several rounds. One takes the default's place if it is quicker by more
than its ratios to the default differ. `run`, `chat`, `serve`, `bench` and `Model.load` use what was found,
unless an option says otherwise; `export CKPT OUT --for local`, or `--for ssh://...`, exports the format and
recipe that were the quickest there. The settings lie in the cache folder, not in the bundle.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from gemma_edge.benchmarks.measure.tune_job import (
    Labelled,
    check_sizes,
    export_candidates,
    forget_choice,
    keep_choice,
    tune_bundles,
)
from gemma_edge.benchmarks.measure.tuning import Candidate, Trial, Tuned, first_candidates
from gemma_edge.benchmarks.measure.tuning_place import OtherMachine, Place, ThisMachine
from gemma_edge.benchmarks.records.measurement import TurnSizes
from gemma_edge.cli.bundle_options import add_words, take_bundles
from gemma_edge.cli.device_options import BEHIND_SSH, LOCAL
from gemma_edge.cli.exported_once import is_checkpoint
from gemma_edge.cli.text_table import text_table
from gemma_edge.devices.open_device import open_device
from gemma_edge.export.checkpoint.checkpoint import revision_of
from gemma_edge.export.formats.registry import FORMAT_NAMES
from gemma_edge.export.weights.recipe import DEFAULT_RECIPE
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.abandoned import temporary_folder

FOLDER_FORMATS = ("onnx", "tflite")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_words(parser, "[BUNDLE...]", "or a checkpoint; further bundles are compared with it")
    parser.add_argument(
        "--device", metavar="DEVICE", help=f"tune this device: {LOCAL} (default), {BEHIND_SSH}"
    )
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="NAME",
        help=f"of a checkpoint; repeatable (default: {DEFAULT_RECIPE})",
    )
    parser.add_argument(
        "--format",
        action="append",
        choices=FORMAT_NAMES,
        help="of a checkpoint; repeatable (default: onnx and tflite, where they run)",
    )
    parser.add_argument(
        "-p", "--n-prompt", type=int, default=256, metavar="N", help="tokens of a prompt (default: 256)"
    )
    parser.add_argument(
        "-n", "--n-gen", type=int, default=32, metavar="N", help="tokens of an answer (default: 32)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds, 2 or more (default: 3)")
    parser.add_argument(
        "-r", "--reps", type=int, default=2, metavar="N", help="turns of a setting in a round (default: 2)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what would be measured, and end")
    what.add_argument("--forget", action="store_true", help="forget what was found, and end")
    parser.add_argument("--json", action="store_true", help="print the measurements and the choice as JSON")


def run(args: argparse.Namespace) -> int:
    """The verb.

    Raises:
        UsageError, BundleError: it cannot be measured.
        DeviceError, ChildError: a run failed.
        GemmaEdgeError: the cache folder takes no settings.
    """
    if args.rounds < 2 or min(args.reps, args.n_prompt, args.n_gen) < 1:
        raise UsageError("--rounds must be 2 or more; -p, -n and --reps 1 or more")
    sources = take_bundles(args)
    checkpoint = str(sources[0]) if len(sources) == 1 and is_checkpoint(str(sources[0])) else None
    if not checkpoint and (args.recipe or args.format):
        raise UsageError("--recipe and --format are for a checkpoint: a bundle has its own")
    with ExitStack() as stack:
        place = _place(args, stack)
        if args.forget:
            return _forget(place, sources, checkpoint)
        place.check()
        if checkpoint:
            folder = stack.enter_context(temporary_folder("tune"))
            formats = args.format or [f for f in FOLDER_FORMATS if f in place.formats]
            recipes = args.recipe or [DEFAULT_RECIPE]
            if args.dry_run:
                print("\n".join(f"{format} {recipe}" for format in formats for recipe in recipes))
                return 0
            bundles = list(export_candidates(checkpoint, folder, formats, recipes))
        else:
            bundles = [(path, path.resolve().name) for path in sources]
        return _tune(args, place, bundles, checkpoint)


def _place(args: argparse.Namespace, stack: ExitStack) -> Place:
    if args.device in (None, LOCAL):
        return ThisMachine()
    device = stack.enter_context(open_device(args.device))
    stack.enter_context(device.awake())
    return OtherMachine(device)


def _tune(args: argparse.Namespace, place: Place, bundles: Sequence[Labelled], checkpoint: str | None) -> int:
    sizes = TurnSizes(args.n_prompt, args.n_gen, args.reps, 1, args.n_prompt + args.n_gen)
    check_sizes(bundles, sizes)
    processor = place.processor()
    if args.dry_run:
        print("\n".join(map(str, first_candidates(bundles, processor))))
        return 0
    try:
        tuned = tune_bundles(place, bundles, sizes, args.rounds)
    finally:
        if checkpoint:
            for path, _ in bundles:
                place.remove(path)
    files = keep_choice(place, tuned, processor.name)
    if args.json:
        print(json.dumps(_as_json(tuned, processor.name, files)))
        return 0
    table = text_table([HEAD, *(_row(trial, tuned) for trial in tuned.trials)])
    print(processor.name, "", table, "", _verdict(args, tuned, checkpoint), sep="\n")
    return 0


def _forget(place: Place, sources: Sequence[Path], checkpoint: str | None) -> int:
    found = int(place.forget(revision_of(checkpoint))) if checkpoint else forget_choice(place, sources)
    print(f"forgot {found} settings" if found else "nothing was tuned")
    return 0


HEAD = ("bundle", "threads", "chunk", "prefill tok/s", "decode tok/s", "speed", "")


def _row(trial: Trial, tuned: Tuned) -> tuple[str, ...]:
    candidate = trial.candidate
    prefill, decode = (trial.speed(prompt) for prompt in (True, False))
    notes = ["default"] if trial is tuned.trials[0] else []
    notes += ["chosen"] if candidate == tuned.best else [trial.left_out] if trial.left_out else []
    return (
        candidate.label,
        str(candidate.threads),
        str(candidate.chunk),
        "" if prefill is None else f"{prefill:.1f}",
        "" if decode is None else f"{decode:.1f}",
        f"{trial.ratio:.2f}x" if trial.ratios else "",
        ", ".join(notes),
    )


def _verdict(args: argparse.Namespace, tuned: Tuned, checkpoint: str | None) -> str:
    best = tuned.best
    kept = f"{best}: {tuned.gain:.2f}x the default's speed"
    if best == tuned.trials[0].candidate:
        kept = f"{best}: nothing else was quicker by more than the noise"
    if checkpoint:
        where = args.device or LOCAL
        return f"{kept}. Next: gemma-edge export {checkpoint} OUT --for {where}"
    return f"{kept}. `run`, `chat`, `serve` and `bench` use it; --forget undoes it"


def _as_json(tuned: Tuned, machine: str, files: Sequence[Path]) -> dict[str, object]:
    def said(candidate: Candidate) -> dict[str, object]:
        return {"bundle": candidate.label, "threads": candidate.threads, "chunk": candidate.chunk}

    trials = [
        {
            **said(trial.candidate),
            "prefill_ts": trial.speed(True),
            "decode_ts": trial.speed(False),
            "ratios": trial.ratios,
            "left_out": trial.left_out or None,
        }
        for trial in tuned.trials
    ]
    chosen = {**said(tuned.best), "gain": round(tuned.gain, 3)}
    return {"machine": machine, "trials": trials, "chosen": chosen, "files": list(map(str, files))}
