"""Copies a finished run's checkpoint into the repository, with questions for CI and the demo.

    python pocket/training/teach.py RUN --from CHECKPOINT
    python pocket/training/publish.py RUN

Writes checkpoint/, questions/ with prose.txt and measured.json (what bundles answer right), and curve.png.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from curve import draw
from held_out import SHOWN_SEED, TASKS, write_questions
from pictures import QUESTIONS
from prose import chapters
from speech import SPEECH_TASKS
from text_tasks import TEXT_TASKS
from tool_tasks import TOOL_TASKS

from gemma_edge.benchmarks.measure.questions import answers, read_questions, scores
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.model import Model

HERE = Path(__file__).parents[1]
# Questions of a task in git: a recording takes 40 kB, a picture 300 bytes.
EACH = {
    **dict.fromkeys((*TEXT_TASKS, *QUESTIONS), 10),
    **dict.fromkeys(TOOL_TASKS, 5),
    **dict.fromkeys(SPEECH_TASKS, 3),
}
# One of each is what the demo asks.
SHOWN = ("facts", "image what", "speech commands", "translated commands", "tools call python")
PROSE_BYTES = 50_000
RECIPES = ("int8", "int4")  # whose answers are counted


def write_prose(path: Path, cache: Path) -> None:
    """The shortest held-out chapters, as many as PROSE_BYTES have room for, in the order of the books."""
    shortest = sorted((chapter for chapter in chapters(cache) if chapter.held_out), key=lambda c: len(c.text))
    taken, size = [], 0
    for chapter in shortest:
        size += len(chapter.text.encode()) + 2
        if size > PROSE_BYTES:
            break
        taken.append(chapter)
    taken.sort(key=lambda c: (c.book, c.number))
    path.write_text("\n\n".join(chapter.text for chapter in taken) + "\n", encoding="utf-8")


def publish(run: Path) -> None:
    """Replaces what is published with what `run` made."""
    checkpoint, questions = HERE / "checkpoint", HERE / "questions"
    for folder in (checkpoint, questions):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "checkpoint", checkpoint)
    write_questions(checkpoint / "samples", dict.fromkeys(SHOWN, 1), SHOWN_SEED)
    shown = read_questions(checkpoint / "samples" / "questions.jsonl")
    tools = next(question.tools for question in shown if question.tools)
    (checkpoint / "samples" / "tools.json").write_text(json.dumps(tools, indent=2) + "\n")
    write_questions(questions, {task: EACH[task] for task in TASKS})
    write_prose(questions / "prose.txt", run / "cache")
    draw(run / "log.jsonl", HERE / "curve.png")
    measured = {recipe: measure(checkpoint, questions, recipe) for recipe in RECIPES}
    (questions / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")


def measure(checkpoint: Path, questions: Path, recipe: str) -> dict[str, int]:
    """How many questions of each task an ONNX bundle answers right."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"recipe": recipe, "context": 512, "verify": False, "calibrate": "none"}
        bundle = export_bundle(checkpoint, Path(folder) / recipe, **options).path
        model = Model.load(bundle, keep_encoders=True, log=lambda text: None)
        counted = scores(answers(model, read_questions(questions / "questions.jsonl")))
    print(f"{recipe}: " + ", ".join(f"{task} {s.right} of {s.total}" for task, s in counted.items()))
    return {task: score.right for task, score in counted.items()}


if __name__ == "__main__":
    publish(Path(sys.argv[1]))
