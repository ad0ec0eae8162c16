"""`Asked`: a request for an answer, checked; and the options that all routes of answers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_edge.runtime.server.api_error import ApiError, refused
from gemma_edge.runtime.server.request_fields import RequestFields
from gemma_edge.runtime.server.server_options import Limits

CHARACTERS_A_TOKEN = 64  # far more than any text has: a prompt above this is too long without being tokenized
LABELS = ("user", "safety_identifier", "prompt_cache_key")  # for OpenAI's own records and caches
STOPS, STOP_CHARACTERS = 4, 256
BIASES = 1024


@dataclass(frozen=True)
class Asked:
    """What a client asks the model.

    Attributes:
        prompt: messages as the library takes them, or a text to complete.
        options: keyword arguments of `Model.generate`.
        stream: in pieces, as they come.
        include_usage: of a stream: a last piece with the usage.
        echo: what a field of the response repeats, by its name.
    """

    prompt: str | list[dict[str, Any]]
    options: dict[str, Any]
    stream: bool = False
    include_usage: bool = False
    echo: Mapping[str, Any] = field(default_factory=dict)


def sampling_options(fields: RequestFields, limits: Limits, *max_names: str) -> dict[str, Any]:
    """temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, logit_bias, speculate, and the most
    tokens.

    `LABELS` are taken and not used: clients get their turns by key or address.

    Args:
        max_names: what the field of the most tokens may be called; the first that is there counts.
    """
    for label in LABELS:
        fields.text(label)
    options = {
        "temperature": fields.number("temperature", 0, 10),
        "top_p": fields.number("top_p", 1e-6, 1),
        "top_k": fields.integer("top_k", 0, 1 << 20),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "seed": fields.integer("seed", 0),
        "stop": _stop(fields),
        "logit_bias": _bias(fields),
        "speculate": fields.flag("speculate") or None,
        "max_tokens": _max_tokens(fields, limits, max_names),
    }
    return {name: value for name, value in options.items() if value is not None}


def _max_tokens(fields: RequestFields, limits: Limits, names: tuple[str, ...]) -> int | None:
    given = [(name, value) for name in names if (value := fields.integer(name, 1)) is not None]
    most = limits.max_tokens
    for name, value in given:
        if most is not None and value > most:
            raise refused(fields.name(name), f"must be at most {most} here")
    return given[0][1] if given else most


def _stop(fields: RequestFields) -> list[str] | None:
    stop = fields.take("stop")
    stops = [stop] if isinstance(stop, str) else stop
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(
        isinstance(s, str) and 0 < len(s) <= STOP_CHARACTERS for s in stops
    ):
        expected = f"must be a text of 1 to {STOP_CHARACTERS} characters, or a list of up to {STOPS} of them"
        raise refused(fields.name("stop"), expected)
    if len(stops) > STOPS:
        raise refused(fields.name("stop"), f"has {len(stops)} texts, the most are {STOPS}")
    return stops


def _bias(fields: RequestFields) -> dict[int, float] | None:
    bias = fields.mapping("logit_bias")
    if bias is None:
        return None
    if len(bias) > BIASES or not all(name.isdecimal() and len(name) < 10 for name in bias):
        raise refused(fields.name("logit_bias"), f"must have token ids as names, at most {BIASES}")
    for name, value in bias.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise refused(f"{fields.name('logit_bias')}.{name}", "must be a number from -100 to 100")
    return {int(name): float(value) for name, value in bias.items()}


def only_one_plain_answer(fields: RequestFields) -> None:
    """n and OpenAI's penalties, which may only say what is done anyway."""
    fields.only("n", 1, why="a request has one answer")
    fields.only("frequency_penalty", 0, why="see repetition_penalty")
    fields.only("presence_penalty", 0, why="see repetition_penalty")


def stream_options(fields: RequestFields) -> tuple[bool, bool]:
    """Whether to stream, and whether to end the stream with the usage."""
    stream, options = fields.flag("stream"), fields.fields("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise refused(fields.name("stream_options"), "needs stream to be true")
    usage = options.flag("include_usage")
    options.only("include_obfuscation", False)
    options.end()
    return stream, usage


class TextBudget:
    """Counts the characters of a prompt while it is read.

    Args:
        context: tokens of the model's context.
    """

    def __init__(self, limits: Limits, context: int) -> None:
        self.left = self.most = limits.text_characters or CHARACTERS_A_TOKEN * context

    def take(self, text: str, where: str) -> str:
        """`text`. Raises ApiError once there is too much of it."""
        self.left -= len(text)
        if self.left < 0:
            raise ApiError(
                400,
                f"the prompt has more than {self.most:,} characters: so many do not fit the context",
                param=where,
                code="context_length_exceeded",
            )
        return text
