"""Messages for tasks whose wording matters: to be passed to `Model.generate`.

model.generate(compare_images(["before.jpg", "after.jpg"]))
model.generate(with_context("Is it open now?", {"time": "9:40", "city": "Lyon"}), tools=[opening_hours])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_edge.runtime.errors import UsageError

Messages = list[dict[str, Any]]
Images = Sequence[Any]  # each as the "image" of a message's part: a path, a Pillow image, an array

COMPARE = "Compare the images. Say first what they have in common, then how they differ, naming each image."
STEPS = (
    "Describe each image on its own: objects, people, text, place, time of day.",
    "Say what the images show together: an order of events, a cause, one place seen twice.",
    "Answer the question from these observations, and name the images that support the answer.",
    "If the images do not show the answer, say what is missing.",
)
REGION = (
    "The reader lives in {region}: use the units, the currency, and the formats of dates and numbers that "
    "are usual there, and examples that are known there. Keep to that region's customs and laws, and say "
    "so where they matter. Do not take a reader's views for granted."
)
FORMAL = "Address the reader formally, with the forms of address of the language."
FAMILIAR = "Address the reader as a friend, with the familiar forms of address of the language."
IDIOMS = "Leave names as they are. Give the meaning of a saying that has no equivalent, not its words."


def compare_images(
    images: Images, question: str = COMPARE, *, names: Sequence[str] | None = None
) -> Messages:
    """Asks about several images at once, each under a name, "Image 1" and so on unless `names` has others.

    Raises:
        UsageError: there are fewer than two images, or not as many names.
    """
    if len(images) < 2:
        raise UsageError(f"a comparison needs two images or more, not {len(images)}")
    return [{"role": "user", "content": [*_named(images, names), _text(_checked(question))]}]


def study_images(
    images: Images, question: str, *, steps: Sequence[str] = STEPS, names: Sequence[str] | None = None
) -> Messages:
    """Asks a question about images that is to be answered step by step.

    Raises:
        UsageError: there is no image or no step, or there are not as many names as images.
    """
    if not images or not steps:
        raise UsageError("studying images needs an image and a step at least")
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    asked = f"Question: {_checked(question)}\n\nWork step by step, and number your steps:\n{numbered}"
    return [{"role": "user", "content": [*_named(images, names), _text(asked)]}]


def for_readers(
    question: str, language: str, *, region: str | None = None, formal: bool | None = None
) -> Messages:
    """Asks for an answer in a language, with the customs of the place where its readers live.

    Args:
        language: its English name, with a variety if that matters: "Swiss German", "Brazilian Portuguese".
        region: a country or a region; None leaves customs open.
        formal: how to address the reader; None leaves that to the model.
    """
    rules = [f"Answer in {_checked(language, 'language')}, whatever the language of the question."]
    if region is not None:
        rules.append(REGION.format(region=_checked(region, "region")))
    if formal is not None:
        rules.append(FORMAL if formal else FAMILIAR)
    system = " ".join([*rules, IDIOMS])
    return [{"role": "system", "content": system}, {"role": "user", "content": _checked(question)}]


def with_context(question: str, context: Mapping[str, object]) -> Messages:
    """Asks a question for `tools=`, with facts that arguments may be taken from: the time, the place, a user.

    Raises:
        UsageError: there is no fact.
    """
    if not context:
        raise UsageError("a context needs one fact at least")
    facts = "\n".join(f"- {name}: {value}" for name, value in context.items())
    asked = (
        f"Context:\n{facts}\n\n"
        "Where the question leaves an argument of a function open, take it from the context. If neither has "
        f"it, ask for it instead of calling the function.\n\nQuestion: {_checked(question)}"
    )
    return [{"role": "user", "content": asked}]


def _named(images: Images, names: Sequence[str] | None) -> list[dict[str, Any]]:
    names = [f"Image {number}" for number in range(1, len(images) + 1)] if names is None else names
    if len(names) != len(images):
        raise UsageError(f"there are {len(images)} images and {len(names)} names")
    parts: list[dict[str, Any]] = []
    for name, image in zip(names, images, strict=True):
        parts += [_text(f"{name}:"), {"type": "image", "image": image}]
    return parts


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _checked(text: str, name: str = "question") -> str:
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"the {name} is empty")
    return text
