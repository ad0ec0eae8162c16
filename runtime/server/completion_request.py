"""The body of /v1/completions as `Asked`."""

from __future__ import annotations

from gemma_edge.runtime.server.api_error import refused
from gemma_edge.runtime.server.asked import (
    Asked,
    TextBudget,
    only_one_plain_answer,
    sampling_options,
    stream_options,
)
from gemma_edge.runtime.server.request_fields import RequestFields
from gemma_edge.runtime.server.server_options import Limits

MAX_LOGPROBS = 5  # as OpenAI has it for this route
DEFAULT_TOKENS = 16  # as OpenAI has it for this route


def completion_request(fields: RequestFields, limits: Limits, context: int) -> Asked:
    """A text to be continued, without the chat template; arguments and errors as of `chat_request`."""
    options = sampling_options(fields, limits, "max_tokens")
    options.setdefault("max_tokens", DEFAULT_TOKENS)
    stream, usage = stream_options(fields)
    prompt, name = fields.needed("prompt", fields.take("prompt")), fields.name("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise refused(name, "must be a text, not empty; lists and token ids are not supported")
    TextBudget(limits, context).take(prompt, name)
    if (count := fields.integer("logprobs", 0, MAX_LOGPROBS)) is not None:
        options["logprobs"] = count
    only_one_plain_answer(fields)
    fields.only("best_of", 1)
    fields.only("suffix")
    echo = fields.flag("echo")
    if echo and count is not None:
        raise refused(fields.name("echo"), "cannot be combined with logprobs")
    fields.end()
    return Asked(prompt, {**options, "raw": True}, stream, usage, {"prefix": prompt if echo else ""})
