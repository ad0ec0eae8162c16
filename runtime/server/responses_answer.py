"""Answers of /v1/responses, and the events of their streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.logprobs import TokenLogprob
from gemma_edge.runtime.server.answer_format import (
    event,
    new_id,
    now,
    prediction_json,
    timing_json,
    tool_calls_json,
)
from gemma_edge.runtime.server.asked import Asked


class ResponsesAnswer:
    """See `AnswerFormat`; arguments as of `ChatAnswer`."""

    def __init__(self, model: str, asked: Asked) -> None:
        self._id, self._message_id = new_id("resp_"), new_id("msg_")
        options = asked.options
        self._common: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": now(),
            "model": model,
            "error": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": options.get("temperature"),
            "top_p": options.get("top_p"),
            "max_output_tokens": options.get("max_tokens"),
            "instructions": asked.echo.get("instructions"),
            "tools": asked.echo.get("tools", []),
            "tool_choice": asked.echo.get("tool_choice", "auto"),
        }
        self._text = ""
        self._sequence = 0

    def whole(self, completion: Completion) -> dict[str, Any]:
        output: list[dict[str, Any]] = []
        calls = tool_calls_json(completion)
        if completion.text or not calls:
            output.append(self._message(completion.text))
        output += map(_call_item, calls)
        return self._response(output, completion)

    def first(self) -> bytes:
        running = {**self._common, "status": "in_progress", "incomplete_details": None, "output": []}
        return (
            self._event("response.created", response={**running, "usage": None})
            + self._event("response.in_progress", response={**running, "usage": None})
            + self._event("response.output_item.added", output_index=0, item=self._opened())
            + self._event("response.content_part.added", **self._place(), part=_text_part(""))
        )

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        self._text += text
        return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def last(self, completion: Completion, rest: Sequence[TokenLogprob]) -> bytes:
        text = self._text
        events = (
            self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place(), part=_text_part(text))
            + self._event("response.output_item.done", output_index=0, item=self._message(text))
        )
        output = [self._message(text)]
        for call in tool_calls_json(completion):
            item, index = _call_item(call), len(output)
            where = {"output_index": index, "item_id": item["id"]}
            arguments = item["arguments"]
            opened = {**item, "arguments": "", "status": "in_progress"}
            events += self._event("response.output_item.added", output_index=index, item=opened)
            events += self._event("response.function_call_arguments.delta", **where, delta=arguments)
            events += self._event("response.function_call_arguments.done", **where, arguments=arguments)
            events += self._event("response.output_item.done", output_index=index, item=item)
            output.append(item)
        response = self._response(output, completion)
        return events + self._event(f"response.{response['status']}", response=response)

    def _response(self, output: list[dict[str, Any]], completion: Completion) -> dict[str, Any]:
        usage = completion.usage
        cut = {"length": "max_output_tokens", "filtered": "content_filter"}.get(completion.finish_reason)
        return {
            **self._common,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": cut} if cut else None,
            "output": output,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0, **prediction_json(usage)},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "timing": timing_json(usage),
            },
        }

    def _opened(self) -> dict[str, Any]:
        head = {"id": self._message_id, "type": "message", "role": "assistant"}
        return {**head, "status": "in_progress", "content": []}

    def _message(self, text: str) -> dict[str, Any]:
        return {**self._opened(), "status": "completed", "content": [_text_part(text)]}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **data: Any) -> bytes:
        made = event({"type": kind, "sequence_number": self._sequence, **data}, kind)
        self._sequence += 1
        return made


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"fc_{call['id']}",
        "type": "function_call",
        "status": "completed",
        "call_id": call["id"],
        **call["function"],
    }
