"""The text that the prompt helpers build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.prompt.chat_template import ChatTemplate
from gemma_edge.runtime.prompt.prompt_helpers import (
    compare_images,
    for_readers,
    study_images,
    with_context,
)


def rendered(messages: list[dict[str, Any]]) -> str:
    """The user's and the system's text, as the template of Gemma 3n writes it."""
    text = ChatTemplate().render(messages)
    before, after = "<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
    assert text.startswith(before) and text.endswith(after)
    return text[len(before) : -len(after)]


def test_images_are_compared_under_their_names() -> None:
    messages = compare_images(["a.jpg", "b.jpg"])
    assert [part.get("image") for part in messages[0]["content"] if part["type"] == "image"] == [
        "a.jpg",
        "b.jpg",
    ]
    assert rendered(messages) == (
        "Image 1:<image_soft_token>Image 2:<image_soft_token>"
        "Compare the images. Say first what they have in common, then how they differ, naming each image."
    )
    assert rendered(compare_images(["a", "b"], "Which is newer?", names=["Left", "Right"])) == (
        "Left:<image_soft_token>Right:<image_soft_token>Which is newer?"
    )


def test_images_are_studied_step_by_step() -> None:
    assert rendered(study_images(["a.jpg"], "What broke?", steps=["Look.", "Think."])) == (
        "Image 1:<image_soft_token>Question: What broke?\n\n"
        "Work step by step, and number your steps:\n1. Look.\n2. Think."
    )
    whole = rendered(study_images(["a.jpg", "b.jpg"], "What broke?"))
    assert whole.count("<image_soft_token>") == 2 and "\n4. If the images do not show the answer" in whole


def test_answers_are_for_readers_of_a_place() -> None:
    text = rendered(for_readers("How do I file taxes?", "Swiss German", region="Zurich", formal=True))
    assert text == (
        "Answer in Swiss German, whatever the language of the question. "
        "The reader lives in Zurich: use the units, the currency, and the formats of dates and numbers that "
        "are usual there, and examples that are known there. Keep to that region's customs and laws, and say "
        "so where they matter. Do not take a reader's views for granted. "
        "Address the reader formally, with the forms of address of the language. "
        "Leave names as they are. Give the meaning of a saying that has no equivalent, not its words."
        "\n\nHow do I file taxes?"
    )
    short = rendered(for_readers("Hi", "Welsh", formal=False))
    assert "lives in" not in short and "as a friend" in short


def test_a_question_for_tools_has_its_context() -> None:
    assert rendered(with_context("Is it open?", {"time": "9:40", "city": "Lyon"})) == (
        "Context:\n- time: 9:40\n- city: Lyon\n\n"
        "Where the question leaves an argument of a function open, take it from the context. If neither has "
        "it, ask for it instead of calling the function.\n\nQuestion: Is it open?"
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: compare_images(["a.jpg"]), "two images or more, not 1"),
        (lambda: compare_images(["a.jpg", "b.jpg"], names=["A"]), "2 images and 1 names"),
        (lambda: study_images([], "What?"), "an image and a step"),
        (lambda: study_images(["a.jpg"], " "), "the question is empty"),
        (lambda: for_readers("Hi", ""), "the language is empty"),
        (lambda: for_readers("Hi", "Welsh", region=""), "the region is empty"),
        (lambda: with_context("Hi", {}), "one fact at least"),
    ],
)
def test_what_is_missing_is_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()
