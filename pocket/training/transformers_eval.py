"""Asks the checkpoint the questions of `gemma-edge eval` in `transformers`.

    python pocket/training/transformers_eval.py CHECKPOINT questions.jsonl [--json]

Weights are the checkpoint's bf16, arithmetic is fp32: most CPUs have none in bf16, or a slow one. Greedy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, Gemma3nForConditionalGeneration

from gemma_edge.benchmarks.measure.questions import (
    MARGIN_TOKENS,
    Answered,
    Question,
    as_answer,
    format_scores,
    read_questions,
    scores,
    take,
    to_json,
)
from gemma_edge.runtime.media.recordings import read_audio
from gemma_edge.runtime.prompt.tool_calls import find_calls
from gemma_edge.runtime.prompt.tool_schemas import normal_tools


class Checkpoint:
    """A checkpoint folder in `transformers`."""

    def __init__(self, folder: Path) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        model, info = Gemma3nForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(
                f"{folder}: misses {info['missing_keys']}, has {info['unexpected_keys']} too many"
            )
        self.model: Any = model.eval()

    def answers(self, questions: Iterable[Question]) -> Iterator[Answered]:
        """Greedy answers, one after the other."""
        tokenizer = self.processor.tokenizer
        for question in questions:
            inputs = self.processor.apply_chat_template(
                [_message(message) for message in question.messages],
                tools=question.tools,
                tool_convention=question.tool_convention or "python",
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )
            limit = len(tokenizer.encode(question.answer, add_special_tokens=False)) + MARGIN_TOKENS
            with torch.no_grad():
                out = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False)
            said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found = find_calls(said, normal_tools(question.tools))
            yield Answered(question.task, question.answer.strip(), as_answer(found.text, found.calls))


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """As `transformers` takes it, with files read."""
    if message["role"] == "tool" or "tool_calls" in message:
        return message
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = []
    for part in content:
        if part["type"] == "image":
            part = {"type": "image", "image": Image.open(part["image"]).convert("RGB")}
        elif part["type"] == "audio":
            samples = np.concatenate([segment.samples for segment in read_audio(part["audio"])])
            part = {"type": "audio", "audio": samples}
        parts.append(part)
    return {"role": message["role"], "content": parts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--each", type=int, help="only the first of each task")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    questions = take(read_questions(args.questions), args.each)
    began, given = time.perf_counter(), []
    for one in Checkpoint(args.checkpoint).answers(questions):
        given.append(one)
        if len(given) % 50 == 0:
            print(f"{len(given)} of {len(questions)}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(to_json(given, time.perf_counter() - began), ensure_ascii=False))
    else:
        print(format_scores(scores(given)))


if __name__ == "__main__":
    main()
