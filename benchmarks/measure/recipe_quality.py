"""The cost of recipes and engines in answers: a checkpoint's bundles, asked the same questions.

For every recipe and format: divergence from the checkpoint over the answers to text questions and over a
text, correct answers by task, size, and the memory of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma_edge.benchmarks.measure.quality_targets import target_rows
from gemma_edge.benchmarks.measure.questions import Answered, Question, agreement, answers, scores
from gemma_edge.benchmarks.measure.target import LocalTarget
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.records.bundle_facts import bundle_facts
from gemma_edge.benchmarks.records.environment import environment, now
from gemma_edge.benchmarks.records.record import Divergence, Quality, QualityColumn, QualityRecord, Score
from gemma_edge.devices.machine.memory import PeakMemory
from gemma_edge.devices.script import progress
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.gate.parity import verify_sequences
from gemma_edge.export.weights.calibration_text import NONE
from gemma_edge.export.weights.recipe import DEFAULT_RECIPE
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines.cores import physical_cores
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.files.typed_json import from_json
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tokenizer import Tokenizer

RECIPES, FORMATS = ("fp32", "int8", DEFAULT_RECIPE), ("onnx", "tflite")
CONTEXT, CHUNK = 512, 128
COMPARED = 100  # text questions over whose answers logits are compared
PIECE, PIECES = 256, 48  # tokens of the pieces of a text, each after <bos>; how many of them
MEMORY_TIMEOUT = 300.0


def measure_bundle(
    source: Path,
    questions: Sequence[Question],
    recipe: str,
    format: str,
    folder: Path,
    text: str = "",
    calibrate: str | None = None,
) -> tuple[QualityColumn, list[Answered]]:
    """Exports `source` to `folder`/bundle: its column, and its answers.

    `calibrate` is as in `export_bundle`; None where no methods are compared.

    The parity gate is off: how far a bundle is from its checkpoint is measured here.
    """
    path = export_bundle(
        source,
        folder / "bundle",
        recipe=recipe,
        format=format,
        context=CONTEXT,
        chunk=CHUNK,
        verify=False,
        calibrate=calibrate,
    ).path
    facts = bundle_facts(path)
    model = Model.load(path, keep_encoders=True, log=lambda text: None)
    given = list(answers(model, questions))
    texts = [question for question in questions if question.kind == "text" and not question.tools]
    texts = texts[:: max(1, len(texts) // COMPARED)]  # of every task
    prompts = [model.prompt_ids(question.messages) for question in texts]
    replies = [model.tokenizer.encode(question.answer, bos=False) for question in texts]
    pieces = text_pieces(model.tokenizer, text) if text else []
    del model
    asked = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    divergence = _divergence(source, path, asked, [len(prompt) - 1 for prompt in prompts])
    workload = Workload((256,), (32,), reps=1, threads=physical_cores(), context=CONTEXT)
    report = LocalTarget(path).work(workload, None, MEMORY_TIMEOUT).report
    peak = report.memory.peak if report and report.memory else PeakMemory()
    method = {None: None, NONE: "nearest"}.get(calibrate, "calibrated")
    rates = [test.avg_ts for test in report.tests if test.n_gen] if report and method else []
    column = QualityColumn(
        f"{recipe}{f' {method}' if method else ''}, {facts.engine.removesuffix(' Runtime')}",
        *counts(questions, given),
        divergence=divergence,
        file_bytes=facts.file_bytes,
        peak_rss_anon_bytes=peak.rss_anon,
        peak_rss_file_bytes=peak.rss_file,
        prose=_divergence(source, path, pieces, [0] * len(pieces)),
        recipe=recipe if method else None,
        method=method,
        bytes_per_token=facts.bytes_per_token if method else None,
        decode_rate=rates[0] if rates else None,
    )
    return column, given


def text_pieces(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """The beginning of a text, PIECES times PIECE tokens, each piece after <bos>."""
    bos, *ids = tokenizer.encode(text, bos=True)
    starts = range(0, len(ids), PIECE - 1)[:PIECES]
    return [[bos, *ids[start : start + PIECE - 1]] for start in starts]


def _divergence(
    source: Path, bundle: Path, sequences: list[list[int]], starts: list[int]
) -> Divergence | None:
    """Of the bundle from its checkpoint; None if there is nothing to compare."""
    if not sequences:
        return None
    with Checkpoint.open(source, ()) as checkpoint:
        differences = verify_sequences(Bundle.open(bundle), checkpoint, sequences, starts=starts)
    return from_json(Divergence, differences.to_dict())


def counts(
    questions: Sequence[Question], given: Sequence[Answered]
) -> tuple[dict[str, Score], dict[str, Score]]:
    """How many were answered correctly, by task and by medium."""
    of_kind = [
        Answered(question.kind, one.answer, one.got) for question, one in zip(questions, given, strict=True)
    ]
    return scores(given), scores(of_kind)


def raw_answers(given: Sequence[Answered]) -> dict[str, str]:
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


def agreements(given: Mapping[str, list[Answered]]) -> dict[str, dict[str, float]]:
    """How often each column says what each other one says, right or not."""
    return {
        name: {other: agreement(theirs, ours) for other, theirs in given.items() if other != name}
        for name, ours in given.items()
    }


def measure_quality(
    checkpoint: Path,
    questions: Sequence[Question],
    *,
    recipes: Sequence[str] = RECIPES,
    formats: Sequence[str] = FORMATS,
    others: Mapping[str, list[Answered]] | None = None,
    text: str = "",
    name: str,
    calibrate: Sequence[str] = (),
) -> QualityRecord:
    """Exports a checkpoint in every recipe and format, and asks every bundle all questions.

    Args:
        others: answers of other programs by their names, each a column of its own.
        text: over which logits are compared too.
        name: of the model, in the record.
        calibrate: methods of rounding, as in `export_bundle`, in each of which every recipe is exported.

    Raises:
        UsageError: `others` has answers to other questions.
        CheckpointError, ConfigError: the checkpoint cannot be exported.
    """
    given = dict(others or {})
    for program, replies in given.items():
        if [one.answer for one in replies] != [question.answer.strip() for question in questions]:
            raise UsageError(f"--answers {program}: these are answers to other questions")
    columns = [QualityColumn(program, *counts(questions, replies)) for program, replies in given.items()]
    model, methods = "", list[str | None](calibrate) or [None]
    for recipe in recipes:
        for format in formats:
            for method in methods:
                with temporary_folder("quality") as folder:
                    column, replies = measure_bundle(
                        checkpoint, questions, recipe, format, folder, text, method
                    )
                    model = bundle_facts(folder / "bundle").model
                columns.append(column)
                given[column.name] = replies
                right = sum(one.right for one in replies)
                progress(f"{column.name}: {right} of {len(questions)} right")
    metrics = Quality(tuple(columns), agreements(given))
    return QualityRecord(
        kind="quality",
        name=name,
        model=model,
        recipe=", ".join(recipes),
        time=now(),
        environment=environment(),
        metrics=metrics,
        raw={program: raw_answers(replies) for program, replies in given.items()},
        readme=() if calibrate else tuple(target_rows(name, metrics)),
    )
