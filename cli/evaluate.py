"""Ask a bundle questions with one right answer each, and count the correct answers.

    gemma-edge eval out/ questions.jsonl
    gemma-edge eval ckpt/ questions.jsonl --recipe int8 --recipe int4     the cost of recipes in answers

TASKS is a JSON lines file, one question a line:

    {"task": "arithmetic", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "answer": "7"}

Messages are as `Model.generate` takes them; files of images and recordings are named relative to TASKS.
Answers are greedy. An answer is correct if it equals `answer` to the letter, except for white space around
it.

For a checkpoint, every recipe is exported in every format to a temporary folder and asked. The table that is
printed also has the divergence of logits from the checkpoint, over the answers and over `--text`, the size,
and the peak memory.

A question may have `tools`, a list of JSON schemas, and `tool_convention`. An answer that calls tools is a
JSON list of {"name": ..., "arguments": {...}}.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from gemma_edge.benchmarks.measure.questions import (
    Answered,
    Question,
    answers,
    format_scores,
    read_questions,
    scores,
    take,
    to_json,
)
from gemma_edge.benchmarks.measure.recipe_quality import FORMATS, RECIPES, measure_quality, read_answers
from gemma_edge.benchmarks.output.quality_table import render_methods, render_quality
from gemma_edge.benchmarks.records.results_file import append_record, json_line
from gemma_edge.cli.bundle_options import add_words, take_bundle
from gemma_edge.devices.script import progress
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.weights.calibration_text import read_calibration
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model import Model


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_words(parser, "TASKS", "it may be a checkpoint to export; then JSON lines of questions")
    parser.add_argument(
        "--task", action="append", default=[], metavar="NAME", help="ask only this task; repeatable"
    )
    parser.add_argument("--each", type=int, metavar="N", help="ask only the first N questions of each task")
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers too")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with scores and all answers"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="worker threads (default: one a core)")
    recipes = parser.add_argument_group("for a checkpoint")
    recipes.add_argument(
        "--recipe", action="append", metavar="NAME", help=f"repeatable (default: {', '.join(RECIPES)})"
    )
    recipes.add_argument(
        "--format", action="append", choices=FORMATS, help="repeatable (default: all of them)"
    )
    recipes.add_argument(
        "--answers",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="answers of another program, as --json prints them: a column of their own",
    )
    recipes.add_argument(
        "--text", type=Path, metavar="FILE", help="compare logits over the beginning of this text too"
    )
    recipes.add_argument(
        "--calibrate",
        action="append",
        default=[],
        metavar="TEXT",
        help="export every recipe with --calibrate TEXT; repeatable, so that none and auto are compared",
    )
    recipes.add_argument("--name", help="the model's name in results (default: the checkpoint's folder)")
    recipes.add_argument("--record", type=Path, metavar="FILE", help="append a record to this JSONL file")


def run(args: argparse.Namespace) -> int:
    """The verb. Raises what `Model.load`, `read_questions`, `answers` and `measure_quality` raise."""
    bundle, tasks = take_bundle(args, 1)
    if not tasks:
        raise UsageError("no questions: gemma-edge eval BUNDLE TASKS, where TASKS is a JSON lines file")
    questions = take(read_questions(tasks[0]), args.each, args.task)
    checkpoint = Path(bundle)
    if (checkpoint / "config.json").is_file() and not (checkpoint / "manifest.json").is_file():
        return _compare(args, checkpoint, questions)
    given = next(
        (
            f
            for f in ("recipe", "format", "answers", "text", "calibrate", "name", "record")
            if getattr(args, f)
        ),
        None,
    )
    if given:
        raise UsageError(f"--{given} is for a checkpoint, and {bundle} is none")
    model = Model.load(bundle, threads=args.threads, keep_encoders=True, log=lambda text: None)
    began, replies = time.perf_counter(), list[Answered]()
    with ProgressBar("questions", len(questions), True, "") as bar:
        for one in answers(model, questions):
            replies.append(one)
            bar.advance(1)
    seconds = time.perf_counter() - began
    if args.json:
        print(json.dumps(to_json(replies, seconds), ensure_ascii=False))
        return 0
    for one in replies:
        if args.wrong and not one.right:
            print(f"{one.task}: expected {one.answer!r}, got {one.got!r}")
    print(format_scores(scores(replies)))
    progress(f"{len(replies)} answers in {seconds:.1f} s")
    return 0


def _compare(args: argparse.Namespace, checkpoint: Path, questions: list[Question]) -> int:
    try:
        text = args.text.read_text(encoding="utf-8") if args.text else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{args.text}: cannot be read as UTF-8 text: {error}") from None
    for choice in args.calibrate:
        read_calibration(choice)
    record = measure_quality(
        checkpoint,
        questions,
        recipes=args.recipe or RECIPES,
        formats=args.format or FORMATS,
        others=dict(read_answers(named) for named in args.answers),
        text=text,
        calibrate=args.calibrate,
        name=args.name or checkpoint.resolve().name,
    )
    if args.record:
        append_record(args.record, record)
    table = render_methods([record]) if args.calibrate else render_quality(record.metrics)
    print(json_line(record).rstrip() if args.json else table)
    return 0
