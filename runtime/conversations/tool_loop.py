"""Runs the tools that a model calls, and tells it what they returned, until it answers in text.

Nothing is run but functions that the caller passed as tools. An error of a tool is a result like any other:
the model reads it, and may call again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_edge.runtime.answers import Completion, Stream
from gemma_edge.runtime.errors import UsageError, printable
from gemma_edge.runtime.prompt.chat_template import result_text
from gemma_edge.runtime.prompt.tool_calls import ToolCall
from gemma_edge.runtime.prompt.tool_schemas import Tool, ToolSource, normal_tools

MAX_STEPS = 8
MAX_RESULT_CHARACTERS = 1 << 16
DENIED = "the user does not allow this call"

Message = dict[str, Any]
Approve = Callable[[ToolCall], bool]


@dataclass(frozen=True)
class ToolRun:
    """What came of a turn.

    Attributes:
        completion: the last answer. Its finish_reason is "tool_calls" if the limit of steps is reached, or if
            a tool without a function is called: such a call is open, for the caller to answer.
        messages: the answers and the results, in order, for the conversation.
    """

    completion: Completion
    messages: list[Message] = field(default_factory=list)


def run_tools(
    answer: Callable[[list[Message]], Completion],
    tools: Sequence[ToolSource | Tool] | None,
    *,
    max_steps: int = MAX_STEPS,
    approve: Approve | None = None,
) -> ToolRun:
    """Asks, runs the tools that are called, and asks again with their results.

    Args:
        answer: answers the turn; it gets the messages that came of it so far.
        tools: as `normal_tools` takes them.
        max_steps: most answers; the calls of the last one are not run.
        approve: is asked before each call; False tells the model that it is not allowed.

    Raises:
        UsageError: `max_steps` is below 1, or a tool cannot be used.
        Whatever `answer` and `approve` raise.
    """
    if max_steps < 1:
        raise UsageError(f"max_steps must be 1 or more, not {max_steps}")
    functions = {tool.name: tool.function for tool in normal_tools(tools)}
    messages: list[Message] = []
    for left in reversed(range(max_steps)):
        said = answer(list(messages))
        described = [call for call in said.tool_calls if not call.error and functions[call.name] is None]
        if not said.tool_calls or described or not left:
            # Calls at the limit are no part of the conversation, so that it can go on.
            messages.append(assistant_message(said, with_calls=bool(described)))
            break
        messages.append(assistant_message(said))
        for call in said.tool_calls:
            function = functions.get(call.name)
            result = (
                _error(call.error) if function is None or call.error else run_call(call, function, approve)
            )
            messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result})
    return ToolRun(said, messages)


def assistant_message(said: Completion, *, with_calls: bool = True) -> Message:
    """An answer as a message."""
    message: Message = {"role": "assistant", "content": said.text}
    if said.tool_calls and with_calls:
        message["tool_calls"] = [call.to_dict() for call in said.tool_calls]
    return message


def completed(stream: Stream) -> Completion:
    """Reads a stream to its end."""
    with stream:
        for _ in stream:
            pass
    return stream.completion


def run_call(call: ToolCall, function: Callable[..., Any], approve: Approve | None = None) -> str:
    """What the tool returned, or {"error": ...}, as text of at most `MAX_RESULT_CHARACTERS`."""
    if approve is not None and not approve(call):
        return _error(DENIED)
    try:
        value = function(**call.arguments)
    except Exception as error:  # whatever the tool raises is for the model to read
        return _error(f"{type(error).__name__}: {error}")
    try:
        text = result_text(value)
    except UsageError:
        text = str(value)
    left_out = len(text) - MAX_RESULT_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_RESULT_CHARACTERS]}... ({left_out} characters left out)"


def _error(text: Any) -> str:
    return json.dumps({"error": printable(text)}, ensure_ascii=False)


def callable_tools(names: Mapping[str, Any], module: str) -> list[Callable[..., Any]]:
    """The public functions that a module defines itself, in its order; or its list `TOOLS`, if it has one."""
    if "TOOLS" in names:
        return list(names["TOOLS"])
    own = (value for name, value in names.items() if not name.startswith("_"))
    return [
        value
        for value in own
        if callable(value) and not isinstance(value, type) and getattr(value, "__module__", None) == module
    ]
