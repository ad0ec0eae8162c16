"""The body of /v1/responses as `Asked`: its stateless part."""

from __future__ import annotations

from typing import Any

from gemma_edge.runtime.server.api_error import refused
from gemma_edge.runtime.server.asked import Asked, TextBudget, sampling_options
from gemma_edge.runtime.server.chat_request import ROLES, function_schema, json_schema, tool_choice
from gemma_edge.runtime.server.data_urls import image_part
from gemma_edge.runtime.server.request_fields import RequestFields
from gemma_edge.runtime.server.server_options import Limits

TEXTS = ("input_text", "output_text")


def responses_request(fields: RequestFields, limits: Limits, context: int) -> Asked:
    """An input to be answered; arguments and errors as of `chat_request`."""
    options = sampling_options(fields, limits, "max_output_tokens")
    stream, budget = fields.flag("stream"), TextBudget(limits, context)
    instructions = fields.text("instructions")
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": budget.take(instructions, fields.name("instructions"))})
    given = fields.needed("input", fields.take("input"))
    if isinstance(given, str):
        messages.append({"role": "user", "content": budget.take(given, fields.name("input"))})
    else:
        messages += _items(given, fields.name("input"), limits, budget)
    tools, echo = _tools(fields, limits)
    options |= tools
    if (response_format := _text_format(fields)) is not None:
        options["response_format"] = response_format
    fields.only("store", False, why="nothing is stored: send the whole conversation as input")
    fields.only("parallel_tool_calls", True)
    fields.only("truncation", "disabled")
    fields.only("background", False)
    fields.only("service_tier", "auto", "default")
    include = fields.take("include")
    if include not in (None, []):
        raise refused(fields.name("include"), "is not supported", "unsupported_parameter")
    fields.end()
    return Asked(messages, options, stream, True, {**echo, "instructions": instructions})


def _items(given: Any, where: str, limits: Limits, budget: TextBudget) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not 0 < len(given) <= limits.messages:
        raise refused(where, f"must be a text or a list of 1 to {limits.messages} items")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        fields = RequestFields(item, f"{where}[{index}]")
        kind = fields.choice("type", ("message", "function_call", "function_call_output")) or "message"
        message = _READERS[kind](fields, limits, budget)
        calls = message.get("tool_calls")
        if calls and messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"] += calls  # of one answer: a message has them together
        else:
            messages.append(message)
        fields.end()
    return messages


def _message(fields: RequestFields, limits: Limits, budget: TextBudget) -> dict[str, Any]:
    role = fields.needed("role", fields.choice("role", ROLES[:-1]))
    fields.take("id")  # of an answer that is sent back
    fields.take("status")
    content, where = fields.needed("content", fields.take("content")), fields.name("content")
    role = "system" if role == "developer" else role
    if isinstance(content, str):
        return {"role": role, "content": budget.take(content, where)}
    if not isinstance(content, list) or not 0 < len(content) <= limits.parts:
        raise refused(where, f"must be a text or a list of 1 to {limits.parts} parts")
    parts = [_part(RequestFields(item, f"{where}[{n}]"), limits, budget) for n, item in enumerate(content)]
    if role == "assistant":
        return {"role": role, "content": "".join(part["text"] for part in parts if "text" in part)}
    return {"role": role, "content": parts}


def _part(fields: RequestFields, limits: Limits, budget: TextBudget) -> dict[str, Any]:
    kind = fields.needed("type", fields.choice("type", (*TEXTS, "input_image")))
    if kind in TEXTS:
        text = fields.needed("text", fields.text("text"))
        fields.only("annotations", [])
        fields.only("logprobs", [])
        fields.end()
        return {"type": "text", "text": budget.take(text, fields.name("text"))}
    url = {"url": fields.needed("image_url", fields.text("image_url")), "detail": fields.take("detail")}
    fields.end()
    return image_part(RequestFields({"image_url": url}, fields.where), limits)


def _call(fields: RequestFields, limits: Limits, budget: TextBudget) -> dict[str, Any]:
    fields.take("id")
    fields.take("status")
    name, arguments = (fields.needed(field, fields.text(field)) for field in ("name", "arguments"))
    budget.take(name + arguments, fields.where)
    function = {"name": name, "arguments": arguments}
    identity = fields.needed("call_id", fields.text("call_id"))
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": identity, "type": "function", "function": function}],
    }


def _result(fields: RequestFields, limits: Limits, budget: TextBudget) -> dict[str, Any]:
    fields.take("id")
    fields.take("status")
    output = fields.needed("output", fields.text("output"))
    identity = fields.needed("call_id", fields.text("call_id"))
    return {"role": "tool", "tool_call_id": identity, "content": budget.take(output, fields.name("output"))}


_READERS = {"message": _message, "function_call": _call, "function_call_output": _result}


def _tools(fields: RequestFields, limits: Limits) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `Model.generate`, and what the response repeats of them."""
    given, choice = fields.items("tools", limits.tools), fields.take("tool_choice")
    if not given:
        if choice not in (None, "auto", "none"):
            raise refused(fields.name("tool_choice"), "needs tools")
        return {}, {"tools": [], "tool_choice": choice or "auto"}
    tools = []
    for index, item in enumerate(given):
        tool = RequestFields(item, f"{fields.name('tools')}[{index}]")
        tool.needed("type", tool.choice("type", ("function",)))
        tools.append({"type": "function", "function": function_schema(tool)})
    chosen = tool_choice(choice, fields.name("tool_choice"), nested=False)
    return {"tools": tools, "tool_choice": chosen}, {"tools": given, "tool_choice": choice or "auto"}


def _text_format(fields: RequestFields) -> dict[str, Any] | None:
    text = fields.fields("text")
    if text is None:
        return None
    text.only("verbosity", "medium")
    chosen = text.fields("format")
    text.end()
    if chosen is None:
        return None
    kind = chosen.needed("type", chosen.choice("type", ("text", "json_object", "json_schema")))
    if kind == "json_schema":
        return {"type": kind, "json_schema": json_schema(chosen)}
    chosen.end()
    return None if kind == "text" else {"type": kind}
