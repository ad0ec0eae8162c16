"""`describe`: what a picture, a recording or a video shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_edge.runtime.answers import Stream
from gemma_edge.runtime.media.attachments import kind_of
from gemma_edge.runtime.model import Model

# The questions by the kind of file.
QUESTIONS = {
    "image": "Describe this image.",
    "audio": "Describe what is heard in this recording.",
    "video": "These are frames of a video with their times, and its sound. Describe the video.",
}
MAX_TOKENS = 512


def describe(
    model: Model,
    path: str | Path,
    prompt: str | None = None,
    *,
    max_tokens: int | None = MAX_TOKENS,
    **options: Any,
) -> Stream:
    """The description of a file, as it is made.

    Args:
        prompt: asked instead of the question for this kind of file.
        options: of `Model.generate`; the answer is greedy unless they say otherwise.

    Raises:
        As `kind_of` and `Model.generate`.
    """
    prompt = prompt or QUESTIONS[kind_of(path)]
    return model.generate(
        prompt, attach=[path], stream=True, max_tokens=max_tokens, **{"temperature": 0.0, **options}
    )
