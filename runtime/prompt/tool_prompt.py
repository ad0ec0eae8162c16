"""Tools and calls in a prompt, for templates that know nothing of them.

The tools become a section of the first turn, as Google's guide to function calling with Gemma 3 has it;
calls and their results become turns of text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_edge.runtime.errors import UsageError, printable
from gemma_edge.runtime.prompt.tool_calls import Convention, ToolCall, write_calls
from gemma_edge.runtime.prompt.tool_schemas import Tool

FORMS: Mapping[Convention, str] = {
    "json": '{"name": function name, "parameters": dictionary of argument name and its value}',
    "python": "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]",
}
OUTPUTS = "```tool_outputs\n{}\n```"

Message = dict[str, Any]


def tools_section(tools: Sequence[Tool], convention: Convention) -> str:
    """What a prompt says of the tools."""
    described = [tool.to_dict()["function"] for tool in tools]
    return (
        "You have access to functions. If you decide to invoke any of the function(s), "
        f"you MUST put it in the format of\n{FORMS[convention]}\n\n"
        "You SHOULD NOT include any other text in the response if you call a function\n"
        f"{json.dumps(described, ensure_ascii=False)}"
    )


def plain_turns(messages: Sequence[Message], tools: Sequence[Tool], convention: Convention) -> list[Message]:
    """Normalized messages with tools, calls and their results as text; roles alternate as in the messages.

    Args:
        messages: of `normalize_messages`.
    """
    turns: list[Message] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            said = message["content"]
            if index and messages[index - 1]["role"] == "tool":
                turns[-1]["results"].append(said)
            else:
                turns.append({"role": "user", "results": [said]})
        elif message.get("tool_calls"):
            text = write_calls(calls_of(message), convention)
            turns.append({"role": message["role"], "content": _joined(message["content"], text)})
        else:
            turns.append(dict(message))
    for turn in turns:
        if "results" in turn:
            turn["content"] = OUTPUTS.format("\n".join(turn.pop("results")))
    if tools:
        first = turns[0]
        first["content"] = _joined(tools_section(tools, convention), first["content"], "\n\n")
    return turns


def calls_of(message: Mapping[str, Any]) -> list[ToolCall]:
    """The calls of a normalized message."""
    return [
        ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message["tool_calls"]
    ]


def check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    """Whether each result follows the calls of which it answers one, and none stays open before a turn.

    Raises:
        UsageError: names the message that is out of order.
    """
    open_ids: list[str] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message["role"] != "tool":
            if open_ids:
                call = printable(repr(open_ids[0]))
                raise UsageError(f"{where} comes before the result of call {call}: answer each call first")
            open_ids = [call["id"] for call in message.get("tool_calls", ())]
            continue
        if not open_ids:
            raise UsageError(f"{where} is the result of a call, but no call is open before it")
        named = message.get("tool_call_id") or open_ids[0]
        if named not in open_ids:
            raise UsageError(
                f"{where}['tool_call_id'] is {printable(repr(named))}, "
                f"the open calls are {printable(', '.join(open_ids))}"
            )
        open_ids.remove(named)


def _joined(before: Any, after: Any, gap: str = "\n") -> Any:
    """Two contents, texts or parts, as one."""
    if isinstance(before, str) and isinstance(after, str):
        return f"{before.rstrip()}{gap}{after}" if before.strip() else after
    if isinstance(before, str) and after and after[0]["type"] == "text":
        return [{"type": "text", "text": _joined(before, after[0]["text"], gap)}, *after[1:]]
    parts = [[{"type": "text", "text": side}] if isinstance(side, str) else side for side in (before, after)]
    return [*parts[0], *parts[1]]
