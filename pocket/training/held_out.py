"""Writes held-out questions as `gemma-edge eval` reads them: questions.jsonl, pictures and recordings.

    python pocket/training/held_out.py FOLDER --each 100

The seed is not that of the questions which training watches. Recordings need espeak-ng
and `soxr`.
"""

from __future__ import annotations

import argparse
import json
import sys
import wave
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from examples import Example, Turn
from pictures import QUESTIONS, Scene, unseen_images
from speech import SPEECH_TASKS, Clip, unseen_speech
from text_tasks import TEXT_TASKS, unseen_text
from tool_tasks import TOOL_TASKS, ToolTalk, unseen_tools

from gemma_edge.benchmarks.measure.questions import as_answer
from gemma_edge.runtime.media.recordings import SAMPLE_RATE
from gemma_edge.runtime.prompt.tool_calls import ToolCall

SEED = 7
SHOWN_SEED = 2  # of the questions that are published
TASKS = {
    **dict.fromkeys(TEXT_TASKS, unseen_text),
    **dict.fromkeys(TOOL_TASKS, unseen_tools),
    **dict.fromkeys(QUESTIONS, unseen_images),
    **dict.fromkeys(SPEECH_TASKS, unseen_speech),
}


def write_questions(folder: Path, each: dict[str, int], seed: int = SEED) -> None:
    """So many questions of every task of `each`, in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as file:
        for task, count in each.items():
            for number, example in enumerate(TASKS[task](task, count, seed)):
                name = f"{task.replace(' ', '-')}-{number}"
                file.write(json.dumps(_question(example, folder, name), ensure_ascii=False) + "\n")


def _question(example: Example, folder: Path, name: str) -> dict[str, Any]:
    if isinstance(example, ToolTalk):
        return _tool_question(example)
    messages = [_message(turn, folder, name) for turn in example.turns]
    return {"task": example.task, "messages": messages, "answer": example.answer}


def _tool_question(talk: ToolTalk) -> dict[str, Any]:
    *messages, last = json.loads(talk.messages)
    calls = [ToolCall("", **call["function"]) for call in last.get("tool_calls", ())]
    return {
        "task": talk.task,
        "messages": messages,
        "tools": json.loads(talk.tools),
        "tool_convention": talk.convention,
        "answer": as_answer(last["content"], calls),
    }


def _message(turn: Turn, folder: Path, name: str) -> dict[str, Any]:
    role = "assistant" if turn.role == "model" else turn.role
    if turn.media is None:
        return {"role": role, "content": turn.text}
    if isinstance(turn.media, Scene):
        kind, file = "image", f"{name}.png"
        turn.media.draw().save(folder / file, optimize=True)
    else:
        kind, file = "audio", f"{name}.wav"
        write_wav(folder / file, turn.media)
    return {"role": role, "content": [{"type": kind, kind: file}, {"type": "text", "text": turn.text}]}


def write_wav(path: Path, clip: Clip) -> None:
    """16 bits, mono, 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((clip.samples() * 32767).astype(np.int16).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=100, help="questions of every task")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this one; may be repeated")
    args = parser.parse_args()
    write_questions(args.folder, dict.fromkeys(args.task or TASKS, args.each))


if __name__ == "__main__":
    main()
