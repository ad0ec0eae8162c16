"""The body of /v1/chat/completions as `Asked`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from gemma_edge.runtime.server.api_error import refused
from gemma_edge.runtime.server.asked import (
    Asked,
    TextBudget,
    only_one_plain_answer,
    sampling_options,
    stream_options,
)
from gemma_edge.runtime.server.data_urls import audio_part, image_part
from gemma_edge.runtime.server.request_fields import RequestFields
from gemma_edge.runtime.server.server_options import Limits

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_ALTERNATIVES = 20
NAME_CHARACTERS = 64


def chat_request(fields: RequestFields, limits: Limits, context: int) -> Asked:
    """A chat to be continued; the field "model" is taken already.

    Args:
        context: tokens of the model's context.

    Raises:
        ApiError: a field is malformed, too large or not supported; it is named.
    """
    options = sampling_options(fields, limits, "max_completion_tokens", "max_tokens")
    stream, usage = stream_options(fields)
    given = fields.needed("messages", fields.items("messages", limits.messages, 1))
    budget = TextBudget(limits, context)
    messages = [_message(item, f"messages[{index}]", limits, budget) for index, item in enumerate(given)]
    options |= tool_options(fields, limits)
    options |= _logprobs(fields)
    options |= _prediction(fields, limits, budget)
    response_format = _response_format(fields)
    if response_format is not None:
        options["response_format"] = response_format
    _only_defaults(fields)
    fields.end()
    return Asked(messages, options, stream, usage)


def _only_defaults(fields: RequestFields) -> None:
    """Fields of OpenAI's that may only say what is done anyway."""
    only_one_plain_answer(fields)
    fields.only("parallel_tool_calls", True)
    fields.only("store", False, why="nothing is stored")
    fields.only("service_tier", "auto", "default")
    if fields.has("modalities"):
        modalities = fields.take("modalities")
        if modalities != ["text"]:
            raise refused(
                fields.name("modalities"), 'must be ["text"]: answers are text', "unsupported_value"
            )


def _message(item: Any, where: str, limits: Limits, budget: TextBudget) -> dict[str, Any]:
    fields = RequestFields(item, where)
    role = fields.needed("role", fields.choice("role", ROLES))
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = fields.take("tool_calls") if role == "assistant" else None
    if calls is not None:
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls", limits, budget)
    if role == "tool":
        message["tool_call_id"] = fields.needed("tool_call_id", fields.text("tool_call_id"))
        if (name := fields.text("name")) is not None:
            message["name"] = budget.take(name, fields.name("name"))
    content = fields.take("content")
    if content is None and calls is None:
        raise refused(fields.name("content"), "is missing", "missing_required_parameter")
    message["content"] = "" if content is None else _content(content, f"{where}.content", limits, budget)
    fields.end()
    return message


def _content(content: Any, where: str, limits: Limits, budget: TextBudget) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return budget.take(content, where)
    if not isinstance(content, list) or not content:
        raise refused(where, "must be a text or a list of parts", "invalid_type")
    if len(content) > limits.parts:
        raise refused(
            where, f"has {len(content)} parts, the most are {limits.parts}", "array_above_max_length"
        )
    return [content_part(item, f"{where}[{index}]", limits, budget) for index, item in enumerate(content)]


def content_part(item: Any, where: str, limits: Limits, budget: TextBudget) -> dict[str, Any]:
    """One part of a message's content, as the library takes it."""
    fields = RequestFields(item, where)
    kind = fields.needed("type", fields.choice("type", ("text", "image_url", "input_audio")))
    if kind == "image_url":
        return image_part(fields, limits)
    if kind == "input_audio":
        return audio_part(fields)
    text = fields.needed("text", fields.text("text"))
    fields.end()
    return {"type": "text", "text": budget.take(text, fields.name("text"))}


def _tool_calls(calls: Any, where: str, limits: Limits, budget: TextBudget) -> list[dict[str, Any]]:
    """The calls of an earlier answer."""
    if not isinstance(calls, list) or not 0 < len(calls) <= limits.tools:
        raise refused(where, f"must be a list of 1 to {limits.tools} calls")
    made = []
    for index, item in enumerate(calls):
        call = RequestFields(item, f"{where}[{index}]")
        call.choice("type", ("function",))
        call.take("index")  # of a streamed call, which some clients send back
        function = call.needed("function", call.fields("function"))
        name = function.needed("name", function.text("name"))
        arguments = function.needed("arguments", function.text("arguments"))
        identity = call.needed("id", call.text("id"))
        budget.take(name + arguments, function.where)
        function.end()
        call.end()
        made.append({"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return made


def tool_options(fields: RequestFields, limits: Limits) -> dict[str, Any]:
    """`tools` and `tool_choice` as options of `Model.generate`."""
    tools, choice = fields.items("tools", limits.tools, 1), fields.take("tool_choice")
    if tools is None:
        if choice not in (None, "none", "auto"):
            raise refused(fields.name("tool_choice"), "needs tools")
        return {}
    made = [_tool(item, f"{fields.name('tools')}[{index}]") for index, item in enumerate(tools)]
    chosen = tool_choice(choice, fields.name("tool_choice"))
    return {"tools": made, "tool_choice": chosen}


def _tool(item: Any, where: str) -> dict[str, Any]:
    tool = RequestFields(item, where)
    tool.needed("type", tool.choice("type", ("function",)))
    function = tool.needed("function", tool.fields("function"))
    tool.end()
    return {"type": "function", "function": function_schema(function)}


def function_schema(function: RequestFields) -> dict[str, Any]:
    """The name, description and parameters of a tool."""
    name = function.needed("name", function.text("name"))
    if not 0 < len(name) <= NAME_CHARACTERS:
        raise refused(function.name("name"), f"must have 1 to {NAME_CHARACTERS} characters")
    made: dict[str, Any] = {"name": name}
    for field, value in (
        ("description", function.text("description")),
        ("parameters", function.mapping("parameters")),
    ):
        if value is not None:
            made[field] = value
    function.flag("strict")  # calls are always held to the schema
    function.end()
    return made


def tool_choice(choice: Any, where: str, *, nested: bool = True) -> str | None:
    """OpenAI's tool_choice as the library's: a mode, or a tool's name. By default, calls are held to the
    tools' schemas, if the extra `structured` is there.

    Args:
        nested: a name is in an object "function", as chats have it.
    """
    if choice is None:
        return "auto" if find_spec("llguidance") else None
    if choice in ("auto", "required", "none"):
        return str(choice)
    fields = RequestFields(choice, where)
    fields.needed("type", fields.choice("type", ("function",)))
    function = fields.needed("function", fields.fields("function")) if nested else fields
    name = str(function.needed("name", function.text("name")))
    function.end()
    fields.end()
    return name


def _logprobs(fields: RequestFields) -> dict[str, Any]:
    wanted, count = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_ALTERNATIVES)
    if count is not None and not wanted:
        raise refused(fields.name("top_logprobs"), "needs logprobs to be true")
    return {"logprobs": count or 0} if wanted else {}


def _prediction(fields: RequestFields, limits: Limits, budget: TextBudget) -> dict[str, Any]:
    """A text that the answer may repeat, as the option `speculate`."""
    prediction = fields.fields("prediction")
    if prediction is None:
        return {}
    prediction.needed("type", prediction.choice("type", ("content",)))
    content = prediction.needed("content", prediction.take("content"))
    parts = _content(content, prediction.name("content"), limits, budget)
    prediction.end()
    if isinstance(parts, str):
        return {"speculate": parts or True}
    if not all(part["type"] == "text" for part in parts):
        raise refused(prediction.name("content"), "must have parts of type text alone")
    return {"speculate": "".join(part["text"] for part in parts) or True}


def _response_format(fields: RequestFields) -> Mapping[str, Any] | None:
    chosen = fields.fields("response_format")
    if chosen is None:
        return None
    kind = chosen.needed("type", chosen.choice("type", ("text", "json_object", "json_schema")))
    made: dict[str, Any] = {"type": kind}
    if kind == "json_schema":
        made["json_schema"] = json_schema(chosen.needed("json_schema", chosen.fields("json_schema")))
    chosen.end()
    return None if kind == "text" else made


def json_schema(fields: RequestFields) -> dict[str, Any]:
    """The name and schema of an answer that is JSON."""
    schema = fields.needed("schema", fields.mapping("schema"))
    made = {"name": fields.text("name") or "answer", "schema": schema}
    if (description := fields.text("description")) is not None:
        made["description"] = description
    fields.flag("strict")  # answers are always held to the schema
    fields.end()
    return made
