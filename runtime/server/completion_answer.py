"""Answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.logprobs import TokenLogprob
from gemma_edge.runtime.server.answer_format import DONE, event, finish_reason, new_id, now, usage_json
from gemma_edge.runtime.server.asked import Asked


class CompletionAnswer:
    """See `AnswerFormat`; arguments as of `ChatAnswer`."""

    def __init__(self, model: str, asked: Asked) -> None:
        self._common = {"id": new_id("cmpl-"), "object": "text_completion", "created": now(), "model": model}
        self._include_usage = asked.include_usage
        self._logprobs = asked.options.get("logprobs") is not None
        self._prefix = str(asked.echo.get("prefix", ""))
        self._offset = 0  # of the next token in the answer's text

    def whole(self, completion: Completion) -> dict[str, Any]:
        made = self._choice(
            self._prefix + completion.text, completion.logprobs or (), finish_reason(completion)
        )
        return {**made, "usage": usage_json(completion.usage)}

    def first(self) -> bytes:
        return event(self._choice(self._prefix)) if self._prefix else b""

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        return event(self._choice(text, logprobs))

    def last(self, completion: Completion, rest: Sequence[TokenLogprob]) -> bytes:
        events = event(self._choice("", rest, finish_reason(completion)))
        if self._include_usage:
            events += event({**self._common, "choices": [], "usage": usage_json(completion.usage)})
        return events + DONE

    def _choice(
        self, text: str, tokens: Sequence[TokenLogprob] = (), reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._lists(tokens) if self._logprobs else None
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._common, "choices": [choice]}

    def _lists(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{t.text: t.logprob for t in token.alternatives} for token in tokens],
            "text_offset": offsets,
        }
