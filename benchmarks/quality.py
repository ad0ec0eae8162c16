"""What recipes and engines cost in answers: a checkpoint's bundles, asked the same questions.

    python -m gemma_edge.benchmarks.quality CHECKPOINT questions.jsonl -o results.jsonl

For every recipe and format: divergence from the checkpoint over the text questions and their right answers,
answers by task, size, and the memory of a run. `--answers FILE`, what `gemma-edge eval --json` or
`tests/pocket/transformers_eval.py --json` printed, stands as a row of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from gemma_edge.benchmarks.child import run_child
from gemma_edge.benchmarks.evaluate import (
    Answered,
    Question,
    agreement,
    answers,
    read_questions,
    scores,
    take,
    to_json,
)
from gemma_edge.benchmarks.kernel import kernel_argv, parse_report
from gemma_edge.benchmarks.options import KernelOptions
from gemma_edge.benchmarks.record import bundle_facts, write_record
from gemma_edge.benchmarks.script import progress, run_script
from gemma_edge.export.checkpoint import Checkpoint
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.verify import Agreement, verify_sequences
from gemma_edge.runtime.backends.cores import physical_cores
from gemma_edge.runtime.bundle import Bundle
from gemma_edge.runtime.model import Model

Json = dict[str, Any]

RECIPES, FORMATS = ("fp32", "int8", "int4"), ("onnx", "tflite")
CONTEXT, CHUNK = 512, 128
COMPARED = 60  # text questions that logits are compared over
MEMORY_TIMEOUT = 300.0


class Quality(NamedTuple):
    """What one bundle does: its divergence, its answers, bytes on disk, bytes of heap and of files."""

    name: str
    divergence: Agreement
    given: list[Answered]
    file_bytes: int
    rss_anon: int
    rss_file: int

    def to_dict(self) -> Json:
        return {
            "name": self.name,
            "divergence": self.divergence.to_dict(),
            "tasks": to_json(self.given, 0.0)["tasks"],
            "file_bytes": self.file_bytes,
            "peak_rss_anon_bytes": self.rss_anon,
            "peak_rss_file_bytes": self.rss_file,
        }


def measure(source: Path, questions: list[Question], recipe: str, format: str, folder: Path) -> Quality:
    """Exports `source` to `folder` and measures the bundle.

    The parity gate is off: how far a bundle is from its checkpoint is what is measured.
    """
    name = f"{recipe}, {format}"
    path = export_bundle(
        source, folder / "bundle", recipe=recipe, format=format, context=CONTEXT, chunk=CHUNK, verify=False
    ).path
    model = Model.load(path, keep_encoders=True, log=lambda text: None)
    given = list(answers(model, questions))
    texts = [q for q in questions if all(isinstance(m["content"], str) for m in q.messages)][:COMPARED]
    sequences = [[*model.prompt_ids(q.messages), *model.tokenizer.encode(q.answer, bos=False)] for q in texts]
    del model
    with Checkpoint.open(source, ()) as checkpoint:
        divergence = verify_sequences(Bundle.open(path), checkpoint, sequences)
    options = KernelOptions(n_prompt=256, n_gen=32, reps=1, threads=physical_cores(), context=CONTEXT)
    run = run_child(kernel_argv(path, options, import_time=False), timeout=MEMORY_TIMEOUT, what=name)
    peak = parse_report(run)["memory"]["peak"]
    size = sum(file.bytes for file in Bundle.open(path).files.values())
    return Quality(name, divergence, given, size, peak["rss_anon"], peak["rss_file"])


def table(measured: Sequence[Quality], others: dict[str, list[Answered]]) -> str:
    """Markdown: a column a bundle, a row a measure or a task; `others` are answers from elsewhere."""
    tasks = list(scores(measured[0].given))
    columns = [
        [name, "", "", "", *_shares(given, tasks), _share(given), "", ""] for name, given in others.items()
    ]
    for one in measured:
        divergence = one.divergence
        columns.append(
            [
                one.name,
                f"{divergence.mean_kl:.2g}",
                f"{divergence.top1:.1%}",
                f"{divergence.bundle_perplexity:.3f}",
                *_shares(one.given, tasks),
                _share(one.given),
                f"{one.file_bytes / 1e6:.1f} MB",
                f"{one.rss_anon / 2**20:.0f} MiB",
            ]
        )
    names = ["", "KL, nats a token", "same likeliest token", "perplexity", *tasks, "all", "files", "RssAnon"]
    rows = list(zip(names, *columns, strict=True))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _shares(given: list[Answered], tasks: list[str]) -> list[str]:
    by_task = scores(given)
    return [f"{by_task[task].share:.1%}" if task in by_task else "" for task in tasks]


def _share(given: list[Answered]) -> str:
    return f"{sum(one.right for one in given) / len(given):.1%}"


def format_agreements(measured: Sequence[Quality]) -> str:
    """How often bundles of one recipe, and fp32 and each recipe, say the same."""
    lines = []
    for i, one in enumerate(measured):
        for other in measured[i + 1 :]:
            same = one.name.split(", ")[0] == other.name.split(", ")[0]
            if same or i == 0:
                lines.append(f"{one.name} and {other.name}: {agreement(one.given, other.given):.1%} the same")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m gemma_edge.benchmarks.quality", description=summary)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("questions", type=Path, metavar="QUESTIONS", help="as of gemma-edge eval")
    parser.add_argument("--recipe", action="append", metavar="NAME", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--format", action="append", choices=FORMATS, help="default: both")
    parser.add_argument("--each", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--answers", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSONL file to append records to")
    args = parser.parse_args(argv)
    questions = take(read_questions(args.questions), args.each)
    others = {
        path.stem: [Answered(**one) for one in json.loads(path.read_text())["answers"]]
        for path in args.answers
    }
    measured = []
    for recipe in args.recipe or RECIPES:
        for format in args.format or FORMATS:
            with tempfile.TemporaryDirectory(prefix="gemma-edge-quality-") as folder:
                one = measure(args.checkpoint, questions, recipe, format, Path(folder))
                measured.append(one)
                progress(f"{one.name}: {one.divergence.summary()}")
                if args.output is not None:
                    facts = bundle_facts(Path(folder) / "bundle")
                    write_record(
                        args.output,
                        "quality",
                        name=one.name,
                        model=facts.model,
                        recipe=recipe,
                        metrics=one.to_dict(),
                        raw={"answers": [asdict(answer) for answer in one.given]},
                    )
    print(table(measured, others))
    print(f"\n{format_agreements(measured)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
