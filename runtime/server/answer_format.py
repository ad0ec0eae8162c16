"""`AnswerFormat`: how a route writes an answer, whole or in pieces; what the routes share of that."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.logprobs import TokenLogprob
from gemma_edge.runtime.usage import Usage

DONE = b"data: [DONE]\n\n"
# OpenAI's names of reasons to end, where they differ from ours.
FINISH = {"filtered": "content_filter", "cancelled": "stop", "timeout": "length"}


class AnswerFormat(Protocol):
    """One answer as a route writes it. The events of a stream are bytes, each of them whole."""

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The JSON of an answer that is not streamed."""

    def first(self) -> bytes:
        """The events before the first piece."""

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """The event of a piece of text, with the tokens that came with it if they were asked for."""

    def last(self, completion: Completion, rest: Sequence[TokenLogprob]) -> bytes:
        """The events after the last piece."""


def new_id(prefix: str) -> str:
    """An id such as "chatcmpl-6f1c..."; nobody can guess the next."""
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def event(data: Any, name: str = "") -> bytes:
    """An event of a stream."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def finish_reason(completion: Completion) -> str:
    """The reason by OpenAI's name."""
    return FINISH.get(completion.finish_reason, completion.finish_reason)


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage, and how quick it was in "timing"."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": prediction_json(usage),
        "timing": timing_json(usage),
    }


def prediction_json(usage: Usage) -> dict[str, int]:
    """What came of tokens that were drafted; see `GenerateOptions.speculate`."""
    return {
        "accepted_prediction_tokens": usage.accepted_tokens,
        "rejected_prediction_tokens": usage.drafted_tokens - usage.accepted_tokens,
    }


def timing_json(usage: Usage) -> dict[str, Any]:
    """Seconds and rates; null where nothing was measured."""
    return {
        "time_to_first_token_s": usage.time_to_first_token_s,
        "prefill_tokens_per_s": usage.prefill_tokens_per_s,
        "decode_tokens_per_s": usage.decode_tokens_per_s,
    }


def tool_calls_json(completion: Completion) -> list[dict[str, Any]]:
    """OpenAI's tool_calls: their arguments are JSON in a text."""
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in completion.tool_calls
    ]


def logprobs_json(tokens: Sequence[TokenLogprob]) -> Iterator[dict[str, Any]]:
    """OpenAI's entries of a chat's logprobs."""
    for token in tokens:
        yield {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": list(token.bytes),
            "top_logprobs": [
                {"token": other.text, "logprob": other.logprob, "bytes": list(other.bytes)}
                for other in token.alternatives
            ],
        }
