"""`gemma-edge run --batch`: many prompts from a file, answers into another one."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from gemma_edge.cli.bundle_options import loading
from gemma_edge.runtime.batches.answers_file import AnswersFile
from gemma_edge.runtime.batches.batch_run import BatchRun
from gemma_edge.runtime.batches.prompts_file import check_prompts
from gemma_edge.runtime.console import ProgressLine, tell
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model import Model

SHOWN_ERRORS = 3


def add_batch(parser: argparse.ArgumentParser) -> None:
    """The options of a batch."""
    parser.add_argument("--batch", metavar="FILE", help="answer the prompts of a JSON lines file")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the file of a batch's answers (default: stdout)",
    )


def run_batch_verb(args: argparse.Namespace, bundle: str, words: list[str], options: dict[str, Any]) -> int:
    """Answers a batch.

    Returns:
        0, or the exit code of the first prompt that could not be answered.

    Raises:
        As `run_batch`.
    """
    if words:
        raise UsageError(f"unexpected argument {words[0]!r}: the prompts of --batch are in its file")
    if args.show_prompt:
        raise UsageError("--show-prompt shows one prompt: leave it out, or leave out --batch")
    check_prompts(args.batch)  # before anything is loaded
    answers = None if args.output is None else AnswersFile(args.output)
    try:
        model = Model.load(bundle, defer_decoder=bool(args.attach), **loading(args, snapshots=None))
        run = BatchRun(model, args.batch, answers, system=args.system, attach=args.attach, **options)
        if run.totals.answers:
            tell(f"{args.output}: {run.totals.answers} of {run.total} prompts are answered; going on")
        return _answer(run, answers)
    finally:
        if answers is not None:
            answers.close()


def _answer(run: BatchRun, answers: AnswersFile | None) -> int:
    line, started, before = ProgressLine(), time.monotonic(), run.totals.lines
    line.show(f"0 of {run.total - before}")
    try:
        for answer in run.answer():
            if answers is None:
                print(json.dumps(answer, ensure_ascii=False), flush=True)
            else:
                answers.append(answer)
            line.show(_progress(run, run.totals.lines - before, time.monotonic() - started))
    except KeyboardInterrupt:
        line.clear()
        if answers is not None:
            tell(f"{run.totals.answers} of {run.total} prompts are answered; the same command goes on there")
        raise
    finally:
        line.clear()
    totals = run.totals
    tell(
        f"{totals.answers} of {run.total} prompts answered; prompts {totals.prompt_tokens} tokens "
        f"({totals.cached_tokens} cached); answers {totals.completion_tokens} tokens"
    )
    for number, error in [*run.errors.items()][:SHOWN_ERRORS]:
        tell(f"error: line {number}: {error}")
    if len(run.errors) > SHOWN_ERRORS:
        tell(f"and {len(run.errors) - SHOWN_ERRORS} more errors")
    return next((error.exit_code for error in run.errors.values()), 0)


def _progress(run: BatchRun, done: int, seconds: float) -> str:
    left = run.total - run.totals.lines
    minutes = seconds / done * left / 60
    errors = f", {run.totals.errors} errors" if run.totals.errors else ""
    return f"{run.totals.lines} of {run.total}{errors}; about {minutes:.0f} min left"
