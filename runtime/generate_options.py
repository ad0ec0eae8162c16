"""`GenerateOptions`: the keyword arguments of `Model.generate`, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypedDict

from gemma_edge.runtime.guards import Guard
from gemma_edge.runtime.logprobs import Bias
from gemma_edge.runtime.media.attachments import Attachable
from gemma_edge.runtime.prompt.tool_calls import Convention
from gemma_edge.runtime.prompt.tool_schemas import Tool, ToolSource
from gemma_edge.runtime.prompt.truncation import Side
from gemma_edge.runtime.sampling import Sampling

SAMPLING_OPTIONS = frozenset(field.name for field in fields(Sampling))


class GenerateOptions(TypedDict, total=False):
    """How to answer. An option that is None, or left out, has its default.

    Keys:
        system: a system message before the prompt.
        attach: what goes before the text of the last message, one or a list of them: the path of an image, a
            recording or a video, or anything else that `Reader.value` takes.
        raw: complete the prompt as it is, without the chat template.
        truncate: the part of the user's text to leave out of a prompt that is too long, "start", "end" or
            "middle"; default: that is an error.
        max_tokens: most tokens of the answer; default: as many as the context has room for.
        stop: text that ends the answer and is not part of it; one or several.
        logprobs: report the log-probability of each token, and this many of the likeliest, 0 to 20.
        logit_bias: a number from -100 to 100 by token, added to its logit; a token is an id, a text such as
            "id:5", or a text that is one token.
        guard: one or several that may end the answer; see `gemma_edge.runtime.guards`.
        tools: functions that the model may call, or descriptions of them; see `normal_tools`.
        tool_choice: "auto" holds calls to the tools' schemas, "required" makes the answer a call, "none" a
            text; or the name of the tool to call. Default: calls are found, but not held to anything.
        tool_convention: "json" or "python", how calls are written; default: as the chat template has it.
        response_format: {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": ...}}.
        regex, grammar: the answer matches this expression, or this grammar in llguidance's dialect of Lark.
        choices: the answer is one of these texts.
        speculate: verify tokens that are guessed from the prompt and the answer several at once, where that
            is quicker; a text is one that the answer may repeat, such as a file to change, and is guessed
            from, too. Default: no, as rounding may decide between tokens that nearly tie; see docs/speed.md.
        timeout: seconds that the answer may take, waiting for other requests included; what there is of it
            then is the answer.
        client: who asks; clients take turns when several requests wait.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `Sampling`; default: the bundle's.
    """

    system: str | None
    attach: Attachable | Sequence[Attachable] | None
    raw: bool
    truncate: Side | None
    max_tokens: int | None
    stop: Sequence[str] | str | None
    logprobs: int | None
    logit_bias: Bias | None
    guard: Guard | Sequence[Guard] | None
    tools: Sequence[ToolSource | Tool] | None
    tool_choice: str | Mapping[str, Any] | None
    tool_convention: Convention | None
    response_format: Mapping[str, Any] | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None
    speculate: bool | str | None
    timeout: float | None
    client: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


def check_names(options: Mapping[str, Any]) -> None:
    """Raises TypeError for an option that does not exist, as a call with a wrong name does."""
    if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
        raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")


def sampling_from(options: Mapping[str, Any], default: Sampling) -> Sampling:
    """`default`, but for what `options` say of sampling.

    Raises:
        UsageError: an option is out of its range.
    """
    given = {name: value for name, value in options.items() if name in SAMPLING_OPTIONS and value is not None}
    return replace(default, **given)
