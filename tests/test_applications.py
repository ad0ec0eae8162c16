"""What docs/applications.md prints runs, and batches, queues and probabilities work on both engines."""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.async_answers import AsyncAnswer
from gemma_edge.runtime.batches.batch import generate_batch
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.prompt_helpers import compare_images, study_images
from support.repository import ROOT, blocks

POCKET = ROOT / "pocket" / "checkpoint"
PICTURES = 2 * sorted((POCKET / "samples").glob("image-*.png"))[:1]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}


@pytest.fixture(scope="module", params=["onnx", "tflite"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pocket, trained, with its encoders."""
    folder = tmp_path_factory.mktemp("bundle") / "out"
    return export_bundle(POCKET, folder, recipe="int8", context=1024, verify=False, format=request.param).path


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with Model.load(bundle) as made:
        yield made


def test_printed_python_runs(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gemma_edge")  # as the code does, which leaves it so
    for name in ("out", "guard"):
        shutil.copytree(bundle, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(ROOT / "docs" / "applications.md", "python"))
    exec(compile(code, "printed.py", "exec"), {"__name__": "__main__"})


def test_a_batch_says_what_the_model_says_and_computes_a_prefix_once(model: Model) -> None:
    story = "The fox went to the sea and the sun was over the sea. " * 25
    asked = [f"{story}\n\nWhat is {a} + {b}?" for a in (3, 5) for b in (4, 1, 2)]
    model.reset()
    alone = [model.generate(prompt, **GREEDY) for prompt in asked[:1]]
    model.reset()
    answers = generate_batch(model, asked, **GREEDY)
    usages = [answer.usage for answer in answers if isinstance(answer, Completion)]
    assert len(usages) == len(asked)
    shared = len(model.prompt_ids(story)) - 8
    assert sum(usage.cached_tokens >= shared for usage in usages) == len(asked) - 1
    assert isinstance(answers[0], Completion) and answers[0].finish_reason == alone[0].finish_reason


def test_probabilities_are_those_of_a_distribution(model: Model) -> None:
    answer = model.generate("What is 3 + 4?", logprobs=20, **GREEDY)
    assert len(answer.logprobs) == answer.usage.completion_tokens
    for token in answer.logprobs:
        # Greedy: the likeliest token is the one picked; twenty of them hardly exceed a probability of 1.
        assert token.alternatives[0].token_id == token.token_id
        assert sum(math.exp(other.logprob) for other in token.alternatives) <= 1.0001
    first = answer.logprobs[0]
    other = model.generate("What is 3 + 4?", logit_bias={first.token_id: -100}, logprobs=0, **GREEDY)
    assert other.logprobs[0].token_id == first.alternatives[1].token_id


def test_many_tasks_share_a_model(model: Model) -> None:
    async def ask() -> list[str]:
        prompts = [f"What is {number} + 4?" for number in range(6)]
        answers = [model.agenerate(prompt, **GREEDY) for prompt in prompts]
        return [answer.text for answer in await asyncio.gather(*map(_whole, answers))]

    together = asyncio.run(ask())
    alone = [model.generate(f"What is {number} + 4?", **GREEDY).text for number in range(6)]
    assert together == alone


async def _whole(answer: AsyncAnswer) -> Completion:
    return await answer


def test_a_long_prompt_is_cut_to_the_context(model: Model) -> None:
    for side in ("start", "end", "middle"):
        answer = model.generate("the sea " * 3000, truncate=side, **GREEDY)
        assert 900 < answer.usage.prompt_tokens <= 1024 - 8


def test_several_images_are_compared(model: Model) -> None:
    for messages in (compare_images(PICTURES), study_images(PICTURES, "Which is larger?")):
        prompt = model.prompt(messages)
        assert len(prompt.placed) == 2 and prompt.text.count("Image ") >= 2
    assert (
        model.generate(compare_images(PICTURES, "Which?"), **GREEDY).usage.soft_tokens == prompt.soft_tokens
    )
