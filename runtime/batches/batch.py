"""`generate_batch`: many prompts through one model, those that begin alike one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any, Unpack, cast

from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.errors import BusyError, GemmaEdgeError, MediaError, UsageError
from gemma_edge.runtime.generate_options import GenerateOptions
from gemma_edge.runtime.model import Model, Question
from gemma_edge.runtime.prompt.prompt_builder import Prompt, is_list
from gemma_edge.runtime.reuse.snapshot_pool import common_prefix

# What is tokenized before the first of it is answered: bounds the memory of a long batch.
WINDOW_PROMPTS = 1024
WINDOW_TOKENS = 200_000


@dataclass(frozen=True)
class BatchRequest:
    """A prompt with options of its own; see `GenerateOptions`."""

    prompt: Question
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchAnswer:
    """What came of the request with this index: one of the two is None."""

    index: int
    completion: Completion | None = None
    error: GemmaEdgeError | None = None


def generate_batch(
    model: Model, prompts: Sequence[Question | BatchRequest], **options: Unpack[GenerateOptions]
) -> list[Completion | GemmaEdgeError]:
    """The answers to `prompts`, in their order; an error in the place of a prompt that cannot be answered.

    Args:
        options: of every prompt that does not say otherwise.

    Raises:
        BundleError: the model cannot be used.
    """
    answers: dict[int, Completion | GemmaEdgeError] = {}
    for answer in batch_answers(model, prompts, options):
        answers[answer.index] = cast("Completion | GemmaEdgeError", answer.completion or answer.error)
    return [answers[index] for index in range(len(answers))]


def batch_answers(
    model: Model, prompts: Iterable[Question | BatchRequest], options: GenerateOptions | None = None
) -> Iterator[BatchAnswer]:
    """As `generate_batch`, but each answer as soon as it is there, in the order in which they are computed.

    Prompts are sorted by their tokens, in windows of 1,024, so that a prefix that several share is computed
    as few times as the KV caches allow.
    """
    window: list[_Prepared] = []
    for index, prompt in enumerate(prompts):
        request = prompt if isinstance(prompt, BatchRequest) else BatchRequest(prompt)
        window.append(_prepare(model, index, request, {**(options or {}), **request.options}))
        tokens = sum(len(item.keys) for item in window)
        if len(window) >= WINDOW_PROMPTS or tokens >= WINDOW_TOKENS:
            yield from _answered(model, window)
            window = []
    yield from _answered(model, window)


@dataclass(frozen=True)
class _Prepared:
    """A request: tokenized, if it has no attachments, which stay in their files until it is answered."""

    index: int
    question: Question
    options: Mapping[str, Any]
    prompt: Prompt | None = None
    error: GemmaEdgeError | None = None

    @property
    def keys(self) -> list[int]:
        return self.prompt.keys if self.prompt else []


def _prepare(model: Model, index: int, request: BatchRequest, options: Mapping[str, Any]) -> _Prepared:
    if options.get("attach") or _has_attachments(request.prompt):
        return _Prepared(index, request.prompt, options)
    try:
        prompt = model.prompt_for(request.prompt, **options)
        return _Prepared(index, request.prompt, options, prompt)
    except GemmaEdgeError as error:
        return _Prepared(index, request.prompt, options, error=error)


def _has_attachments(prompt: Question) -> bool:
    if not is_list(prompt):
        return False
    contents = [message.get("content") for message in prompt if isinstance(message, Mapping)]
    parts = chain.from_iterable(content for content in contents if is_list(content))
    return any(isinstance(part, Mapping) and part.get("type") != "text" for part in parts)


def _answered(model: Model, window: list[_Prepared]) -> Iterator[BatchAnswer]:
    items = sorted(window, key=lambda item: item.keys)
    for item, branches in zip(items, _branches([item.keys for item in items]), strict=True):
        if item.error is not None:
            yield BatchAnswer(item.index, error=item.error)
            continue
        prompt = item.prompt
        if prompt:  # snapshots there spare the prompts that follow what they share with this one
            prompt = replace(prompt, boundaries=(*prompt.boundaries, *branches))
        try:
            answer = model.generate(item.question, prepared=prompt, **item.options)
            yield BatchAnswer(item.index, answer)
        except BusyError:
            raise
        except (UsageError, MediaError) as error:
            yield BatchAnswer(item.index, error=error)


def _branches(keys: Sequence[list[int]]) -> list[tuple[int, ...]]:
    """Where, in each of sorted prompts, those that follow it branch off."""
    ahead: list[int] = []  # ascending: the prompts that share least come last
    found: list[tuple[int, ...]] = [()]
    for this, following in reversed(list(pairwise(keys))):
        shared = common_prefix(this, following)
        while ahead and ahead[-1] >= shared:
            ahead.pop()
        ahead.append(shared)
        found.append(tuple(ahead))
    return found[::-1] if keys else []
