"""Copies a finished run's checkpoint into the repository, with questions for CI and the demo.

    python pocket/training/train.py RUN --finish --steps 500
    python pocket/training/publish.py RUN

Writes checkpoint/, questions/ with measured.json (what an int8 bundle answers right), and curve.png.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from curve import draw
from held_out import TASKS, write_questions
from pictures import QUESTIONS
from speech import SPEECH_TASKS
from text_tasks import TEXT_TASKS

from gemma_edge.benchmarks.measure.questions import answers, read_questions, scores
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.model import Model

HERE = Path(__file__).parents[1]
# Questions of a task in git: a recording takes 40 kB, a picture 300 bytes.
EACH = {**dict.fromkeys(TEXT_TASKS, 10), **dict.fromkeys(QUESTIONS, 10), **dict.fromkeys(SPEECH_TASKS, 4)}
SHOWN = ("facts", "image what", "speech commands", "tools")  # one of each is what the demo asks
SHOWN_SEED = 2


def publish(run: Path) -> None:
    """Replaces what is published with what `run` made."""
    checkpoint, questions = HERE / "checkpoint", HERE / "questions"
    for folder in (checkpoint, questions):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "checkpoint", checkpoint)
    write_questions(checkpoint / "samples", dict.fromkeys(SHOWN, 1), SHOWN_SEED)
    write_questions(questions, {task: EACH[task] for task in TASKS})
    draw(run / "log.jsonl", HERE / "curve.png")
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_bundle(
            checkpoint, Path(folder) / "int8", recipe="int8", context=512, verify=False
        ).path
        model = Model.load(bundle, keep_encoders=True, log=lambda text: None)
        measured = scores(answers(model, read_questions(questions / "questions.jsonl")))
    right = {task: score.right for task, score in measured.items()}
    (questions / "measured.json").write_text(json.dumps(right, indent=2) + "\n")
    for task, score in measured.items():
        print(f"{task}: {score.right} of {score.total}")


if __name__ == "__main__":
    publish(Path(sys.argv[1]))
