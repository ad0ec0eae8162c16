"""Answers of /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.logprobs import TokenLogprob
from gemma_edge.runtime.server.answer_format import (
    DONE,
    event,
    finish_reason,
    logprobs_json,
    new_id,
    now,
    tool_calls_json,
    usage_json,
)
from gemma_edge.runtime.server.asked import Asked


class ChatAnswer:
    """See `AnswerFormat`.

    Args:
        model: the name that the answer carries.
    """

    def __init__(self, model: str, asked: Asked) -> None:
        self._common = {"id": new_id("chatcmpl-"), "created": now(), "model": model}
        self._include_usage = asked.include_usage
        self._logprobs = asked.options.get("logprobs") is not None
        head = {**self._common, "object": "chat.completion.chunk"}
        opening = json.dumps(head, ensure_ascii=False, separators=(",", ":"))[:-1]
        # The event of a piece is joined from bytes: it is written once a token.
        self._before = f'data: {opening},"choices":[{{"index":0,"delta":{{"content":'.encode()
        self._after = b'},"logprobs":null,"finish_reason":null}]}\n\n'

    def whole(self, completion: Completion) -> dict[str, Any]:
        calls = tool_calls_json(completion)
        message: dict[str, Any] = {"role": "assistant", "content": completion.text or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        choice = {
            "index": 0,
            "message": {**message, "refusal": None},
            "logprobs": self._logprobs_of(completion.logprobs or ()),
            "finish_reason": finish_reason(completion),
        }
        head = {**self._common, "object": "chat.completion", "choices": [choice]}
        return {**head, "usage": usage_json(completion.usage)}

    def first(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        if self._logprobs:
            return self._chunk({"content": text}, logprobs=logprobs)
        return self._before + json.dumps(text, ensure_ascii=False).encode() + self._after

    def last(self, completion: Completion, rest: Sequence[TokenLogprob]) -> bytes:
        calls = [{"index": index, **call} for index, call in enumerate(tool_calls_json(completion))]
        events = self._chunk({"tool_calls": calls}) if calls else b""
        events += self._chunk({}, finish_reason(completion), logprobs=rest)
        if self._include_usage:
            head = {**self._common, "object": "chat.completion.chunk", "choices": []}
            events += event({**head, "usage": usage_json(completion.usage)})
        return events + DONE

    def _logprobs_of(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": list(logprobs_json(tokens)), "refusal": None} if self._logprobs else None

    def _chunk(
        self, delta: dict[str, Any], reason: str | None = None, *, logprobs: Sequence[TokenLogprob] = ()
    ) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs_of(logprobs) if logprobs else None,
            "finish_reason": reason,
        }
        return event({**self._common, "object": "chat.completion.chunk", "choices": [choice]})
