"""The app of android_demo/ on a phone: install it, give it a model, ask it, measure it.

    gemma-edge android install                       the app, built by android_demo/build.sh if it is not yet
    gemma-edge android push e2b.litertlm             a model; continued after an interruption
    gemma-edge android run "Why is the sky blue?"    the answer streams here
    gemma-edge android run e2b.litertlm "..."        pushes the model first, if it is not there
    gemma-edge android chat                          turn by turn, in the app's conversation
    gemma-edge android bench -o phone.jsonl          pp512 and tg128; for gemma-edge report
    gemma-edge android logs
    gemma-edge android uninstall                     models that were pushed stay

The phone needs USB debugging. Where no app is wanted, `bench --device adb` measures with a program instead.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gemma_edge.cli.device_answers import Printed, sending
from gemma_edge.devices.android_app import AndroidApp, android_app, apk_path
from gemma_edge.devices.open_device import open_device
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.typed_json import FieldError

# In a checkout; what pip installed has none.
BUILD = Path(__file__).resolve().parent.parent / "android_demo" / "build.sh"
ACTIONS = ("install", "push", "run", "chat", "bench", "logs", "uninstall")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge android`."""
    parser.usage = f"%(prog)s {'|'.join(ACTIONS)} [options] [MODEL] [PROMPT]"
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("words", nargs="*", metavar="MODEL, PROMPT", help="a .litertlm; what to ask")
    parser.add_argument("--device", default="adb", metavar="DEVICE", help="adb (default) or adb:SERIAL")
    parser.add_argument(
        "--apk", type=Path, metavar="FILE", help="for install (default: the cache's, or built now)"
    )
    answer = parser.add_argument_group("run and chat")
    answer.add_argument("--max-tokens", type=int, metavar="N", help="at most (default: the app's setting)")
    answer.add_argument("--greedy", action="store_true", help="always the likeliest token")
    answer.add_argument("--seed", type=int, metavar="N", help="for the same answer again")
    bench = parser.add_argument_group("bench")
    bench.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="default: 512")
    bench.add_argument("-n", "--n-gen", type=int, default=128, metavar="N", help="default: 128")
    bench.add_argument("-r", "--reps", type=int, default=5, metavar="N", help="default: 5")
    bench.add_argument("-o", "--output", type=Path, metavar="FILE", help="append the rows to this JSONL file")


def run(args: argparse.Namespace) -> int:
    """The verb.

    Raises:
        UsageError: words that do not fit the action.
        DeviceError: no phone, no app, or the app refuses.
    """
    model, words = _model(args)
    _check(args, model, words)
    with open_device(args.device) as device:
        app = android_app(device)
        if args.action == "install":
            app.install(args.apk or _built(), sending("the app"))
            tell(f"{device.spec}: installed. Next: gemma-edge android push MODEL.litertlm")
        elif args.action == "uninstall":
            app.uninstall()
            tell(f"{device.spec}: removed. Pushed models stay in {app.device.root}.")
        elif args.action == "logs":
            print(app.logs(), end="")
        else:
            there = "" if model is None else app.push_model(model, sending(model.name))
            if args.action == "push":
                tell(f"{device.spec}: {model} is there, as {there}. Next: gemma-edge android run PROMPT")
            elif args.action == "bench":
                _bench(app, there, args)
            else:
                _answers(app, there, args, words)
    return 0


def _built() -> Path:
    """The APK in the cache, built now if a checkout is here and has not built it yet."""
    apk = apk_path()
    if not apk.exists() and BUILD.is_file():
        tell(f"building the app: {BUILD} apk")
        done = subprocess.run([BUILD, "apk", apk], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        if done.returncode:
            raise UsageError("the app was not built; take an APK from elsewhere with --apk FILE")
    return apk


def _model(args: argparse.Namespace) -> tuple[Path | None, list[str]]:
    """The model among the words, and the other words."""
    words = list(args.words)
    if words and words[0].endswith(".litertlm") and (args.action != "run" or len(words) > 1):
        return Path(words[0]), words[1:]
    return None, words


def _check(args: argparse.Namespace, model: Path | None, words: list[str]) -> None:
    expected = {"push": "MODEL.litertlm", "run": "[MODEL.litertlm] PROMPT", "bench": "[MODEL.litertlm]"}
    expected["chat"] = expected["bench"]
    fits = {"push": model is not None and not words, "run": len(words) == 1}
    if not fits.get(args.action, not words and (model is None or args.action in expected)):
        shape = f"gemma-edge android {args.action} {expected.get(args.action, '')}".strip()
        raise UsageError(f"expected {shape}, got {shlex.join([args.action, *args.words])}")
    if model is not None and not model.is_file():
        raise UsageError(f"{model}: no such file")
    if min(args.n_prompt, args.n_gen, args.reps, args.max_tokens or 1) < 1:
        raise UsageError("-p, -n, -r and --max-tokens: expected at least 1")


def _answers(app: AndroidApp, there: str, args: argparse.Namespace, words: list[str]) -> None:
    """One answer, or one for each line of stdin."""
    options: dict[str, bool | int] = {"greedy": args.greedy}
    options |= {"max_tokens": args.max_tokens} if args.max_tokens else {}
    options |= {} if args.seed is None else {"seed": args.seed}
    for turn, prompt in enumerate(words or _typed()):
        write = Printed()
        try:
            for text in app.ask(prompt, there, **options, **{"continue": turn > 0}):
                write.text(text)
        except KeyboardInterrupt:
            app.stop()
            raise
        print(flush=True)
        tell(_figures(app))


def _typed() -> Iterator[str]:
    """Lines of stdin, each after a prompt where a person types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _figures(app: AndroidApp) -> str:
    said = app.figures
    try:
        return (
            f"first token {said['first_token_s']:.2f} s, {said['tokens_per_s']:.1f} tok/s, "
            f"{said['tokens']} tokens; memory {said['memory'] / 1e6:.0f} MB, peak {said['peak'] / 1e6:.0f} MB"
        )
    except (KeyError, TypeError, ValueError):
        raise DeviceError("the app tells no figures: install the APK of this version") from None


def _bench(app: AndroidApp, there: str, args: argparse.Namespace) -> None:
    from gemma_edge.benchmarks.records.results_file import append_record, parse_record
    from gemma_edge.benchmarks.records.rows import BenchRow

    text = app.bench(there, n_prompt=args.n_prompt, n_gen=args.n_gen, reps=args.reps)
    try:
        rows = [parse_record(json.loads(line)) for line in text.splitlines()]
    except (FieldError, ValueError) as error:
        raise DeviceError(f"{app.device.spec}: the app's rows are none: {error}") from None
    for row in rows:
        if isinstance(row, BenchRow):
            print(row)
        if args.output is not None:
            append_record(args.output, row)
    if args.output is not None:
        tell(f"{args.output}: {len(rows)} rows. Next: gemma-edge report {shlex.quote(str(args.output))}")
