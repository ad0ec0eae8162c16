"""What recipes and engines cost in answers: a checkpoint's bundles, asked the same questions.

    python -m gemma_edge.benchmarks.measure.recipe_quality CHECKPOINT questions.jsonl -o results.jsonl

For every recipe and format: divergence from the checkpoint over the answers to text questions, questions
answered right by task, size, and the memory of a run. `--answers NAME=FILE`, what `gemma-edge eval --json` or
`pocket/training/transformers_eval.py --json` printed, stands as a column of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.machine.child import run_child
from gemma_edge.benchmarks.measure.kernel_tests import kernel_argv, parse_report
from gemma_edge.benchmarks.measure.questions import (
    Answered,
    Question,
    agreement,
    answers,
    read_questions,
    scores,
    take,
)
from gemma_edge.benchmarks.options import KernelOptions
from gemma_edge.benchmarks.output.quality_table import bar_rows, render_quality
from gemma_edge.benchmarks.records.record import bundle_facts, write_record
from gemma_edge.benchmarks.script import progress, run_script
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.gate.parity import verify_sequences
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines.cores import physical_cores
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model import Model

Json = dict[str, Any]

RECIPES, FORMATS = ("fp32", "int8", "int4"), ("onnx", "tflite")
ENGINES = {"onnx": "ONNX", "tflite": "LiteRT"}
CONTEXT, CHUNK = 512, 128
COMPARED = 100  # text questions over whose answers logits are compared
MEMORY_TIMEOUT = 300.0


def measure(
    source: Path, questions: Sequence[Question], recipe: str, format: str, folder: Path
) -> tuple[Json, list[Answered]]:
    """Exports `source` to `folder`/bundle: what it costs, and its answers.

    The parity gate is off: how far a bundle is from its checkpoint is what is measured.
    """
    path = export_bundle(
        source, folder / "bundle", recipe=recipe, format=format, context=CONTEXT, chunk=CHUNK, verify=False
    ).path
    model = Model.load(path, keep_encoders=True, log=lambda text: None)
    given = list(answers(model, questions))
    texts = [question for question in questions if question.kind == "text"]
    texts = texts[:: max(1, len(texts) // COMPARED)]  # of every task
    prompts = [model.prompt_ids(question.messages) for question in texts]
    replies = [model.tokenizer.encode(question.answer, bos=False) for question in texts]
    del model
    costs: Json = {}
    if texts:
        with Checkpoint.open(source, ()) as checkpoint:
            costs = verify_sequences(
                Bundle.open(path),
                checkpoint,
                [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)],
                starts=[len(prompt) - 1 for prompt in prompts],
            ).to_dict()
    options = KernelOptions(n_prompt=256, n_gen=32, reps=1, threads=physical_cores(), context=CONTEXT)
    run = run_child(kernel_argv(path, options, import_time=False), timeout=MEMORY_TIMEOUT, what=recipe)
    peak = parse_report(run)["memory"]["peak"]
    return {
        "divergence": costs,
        "file_bytes": bundle_facts(path).file_bytes,
        "peak_rss_anon_bytes": peak["rss_anon"],
        "peak_rss_file_bytes": peak["rss_file"],
    }, given


def counts(questions: Sequence[Question], given: Sequence[Answered]) -> Json:
    """How many were answered right, by task and by what the questions are about."""
    of_kind = [
        Answered(question.kind, one.answer, one.got) for question, one in zip(questions, given, strict=True)
    ]
    return {
        key: {name: {"right": score.right, "total": score.total} for name, score in scores(some).items()}
        for key, some in (("tasks", given), ("kinds", of_kind))
    }


def raw_answers(given: Sequence[Answered]) -> Json:
    """Every question by task, in order: 1 for an answer that was right, 0 for one that was not."""
    by_task: dict[str, str] = {}
    for one in given:
        by_task[one.task] = by_task.get(one.task, "") + str(int(one.right))
    return by_task


def read_answers(named: str) -> tuple[str, list[Answered]]:
    """Of NAME=FILE. Raises UsageError when that is no such thing."""
    name, _, path = named.partition("=")
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))["answers"]
        return name, [Answered(**one) for one in given]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--answers {named}: expected NAME=FILE, the JSON of gemma-edge eval: {error}"
        ) from None


def agreements(given: Mapping[str, list[Answered]]) -> Json:
    """How often each column says what each other one says, right or not."""
    return {
        name: {other: agreement(theirs, ours) for other, theirs in given.items() if other != name}
        for name, ours in given.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(
        prog="python -m gemma_edge.benchmarks.measure.recipe_quality", description=summary
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("questions", type=Path, metavar="QUESTIONS", help="as of gemma-edge eval")
    parser.add_argument("--recipe", action="append", metavar="NAME", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--format", action="append", choices=FORMATS, help="default: both")
    parser.add_argument("--each", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--answers", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--name", help="of the model (default: the checkpoint's folder)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSONL file to append to")
    args = parser.parse_args(argv)
    questions = take(read_questions(args.questions), args.each)
    given = dict(read_answers(named) for named in args.answers)
    for name, others in given.items():
        if [one.answer for one in others] != [question.answer.strip() for question in questions]:
            raise UsageError(f"--answers {name}: these are answers to other questions")
    columns: list[Json] = [{"name": name, **counts(questions, others)} for name, others in given.items()]
    facts = None
    for recipe in args.recipe or RECIPES:
        for format in args.format or FORMATS:
            name = f"{recipe}, {ENGINES[format]}"
            with tempfile.TemporaryDirectory(prefix="gemma-edge-quality-") as folder:
                costs, given[name] = measure(args.checkpoint, questions, recipe, format, Path(folder))
                facts = bundle_facts(Path(folder) / "bundle")
            columns.append({"name": name, **counts(questions, given[name]), **costs})
            right = sum(one.right for one in given[name])
            progress(f"{name}: {right} of {len(questions)} right")
    model = args.name or args.checkpoint.resolve().name
    metrics = {"columns": columns, "agreement": agreements(given)}
    if args.output is not None and facts is not None:
        write_record(
            args.output,
            "quality",
            name=model,
            model=facts.model,
            recipe=", ".join(args.recipe or RECIPES),
            metrics=metrics,
            raw={name: raw_answers(some) for name, some in given.items()},
            readme=bar_rows(model, metrics),
        )
    print(render_quality(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
