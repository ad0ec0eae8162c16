"""Messages to prompt text, through the checkpoint's chat template.

A template comes with a checkpoint, so it is somebody else's code: it runs in Jinja's immutable sandbox, and
all it makes is bounded (`template_sandbox`). The environment otherwise offers what `transformers` does.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_edge.runtime.errors import BundleError, UsageError, printable
from gemma_edge.runtime.families.gemma3n_template import GEMMA3N_TEMPLATE
from gemma_edge.runtime.prompt.tool_calls import Convention, checked_calls
from gemma_edge.runtime.prompt.tool_prompt import check_order, plain_turns
from gemma_edge.runtime.prompt.tool_schemas import Tool

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
ATTACHMENTS = ("image", "audio")  # types of content parts that a template has a placeholder for


class ChatTemplate:
    """A Jinja chat template, compiled when it is first used.

    Args:
        source: the template; None takes Gemma 3n's.
        path: where it came from, to name it in errors.
    """

    def __init__(self, source: str | None = None, path: str | Path = "chat_template.jinja") -> None:
        self.source, self.path = GEMMA3N_TEMPLATE if source is None else source, Path(path)
        self._rendering = threading.Lock()

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos_token: str = "<bos>",
        eos_token: str = "<eos>",
        add_generation_prompt: bool = True,
        tools: Sequence[Tool] = (),
        convention: Convention | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: {"role": ..., "content": text or parts}, in order. A part is {"type": "text", "text":
                ...}, {"type": "image"} or {"type": "audio"}; what else it says of itself is ignored. One of
                role "assistant" may have "tool_calls", one of role "tool" is the result of a call.
            tools: of `normal_tools`.
            convention: how calls are written, see `tool_calls`; default: `default_convention`.

        Raises:
            UsageError: a malformed message, or messages that the template refuses (roles that do not
                alternate).
            BundleError: the template is malformed, leaves the sandbox, or does not come to an end.
        """
        import jinja2
        from jinja2.exceptions import SecurityError

        from gemma_edge.runtime.prompt.template_sandbox import Budget, Refused

        plain = normalize_messages(messages)
        template = self._template
        names: dict[str, Any] = {"tools": None}
        if self.renders_tools(convention):
            names = {"tools": [tool.to_dict() for tool in tools] or None}
            names["tool_convention"] = convention or self.default_convention
        else:
            plain = plain_turns(plain, tools, convention or self.default_convention)
        try:
            with self._rendering:  # the budget is the environment's
                template.environment.budget = Budget()  # type: ignore[attr-defined]
                return template.render(
                    messages=plain,
                    bos_token=bos_token,
                    eos_token=eos_token,
                    add_generation_prompt=add_generation_prompt,
                    **names,
                )
        except Refused as refusal:
            raise UsageError(f"the chat template refuses the messages: {printable(refusal)}") from None
        except SecurityError as error:
            raise self._error("a template that stays in its sandbox", error) from None
        except jinja2.TemplateError as error:
            raise self._error("a template that renders", error.message or type(error).__name__) from None
        except (MemoryError, RecursionError) as error:
            raise self._error("a template that comes to an end", type(error).__name__) from None
        except Exception as error:  # the template's own mistakes: 1 / 0, a missing key
            raise self._error("a template that renders", f"{type(error).__name__}: {error}") from None

    def renders_tools(self, convention: Convention | None = None) -> bool:
        """Whether the template itself writes tools, in this convention if one is given.

        It does if it uses the variable `tools`; the convention can be chosen if it uses `tool_convention`.
        """
        used = self._template.environment.undeclared  # type: ignore[attr-defined]
        return "tools" in used and (convention is None or "tool_convention" in used)

    @property
    def default_convention(self) -> Convention:
        """ "python", as LiteRT-LM reads it, for a template that takes `tool_convention`; else "json"."""
        return "python" if self.renders_tools("python") else "json"

    def check(self) -> None:
        """Compiles the template.

        Raises:
            BundleError: the template is malformed.
        """
        _ = self._template

    @cached_property
    def _template(self) -> Template:
        import jinja2
        from jinja2.exceptions import SecurityError

        from gemma_edge.runtime.prompt.template_sandbox import compile_template

        try:
            return compile_template(self.source)
        except SecurityError as error:
            raise self._error("a template that stays in its sandbox", error) from None
        except jinja2.TemplateSyntaxError as error:
            raise self._error("a Jinja template", f"{error.message} (line {error.lineno})") from None
        except (RecursionError, MemoryError, SyntaxError) as error:
            raise self._error("a Jinja template", type(error).__name__) from None

    def _error(self, expected: str, got: object) -> BundleError:
        remedy = "Take the template of the original checkpoint."
        return BundleError(self.path, "chat template", expected, str(got).rstrip("."), remedy)


def normalize_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy of plain dicts, lists and strings, so that a template can reach nothing else.

    Of an attachment nothing is left but its kind, {"type": "image"} or {"type": "audio"}.

    Raises:
        UsageError: names the message and what is wrong with it.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise UsageError('messages must be a non-empty list of {"role": ..., "content": ...}')
    normal: list[dict[str, Any]] = []
    calls = 0
    for index, message in enumerate(messages):
        normal.append(_check_message(message, f"messages[{index}]", calls))
        calls += len(normal[-1].get("tool_calls", ()))
    check_order(normal)
    return normal


def _check_message(message: object, name: str, calls: int) -> dict[str, Any]:
    """The message as plain values; `calls` were made before it."""
    if not isinstance(message, Mapping):
        raise UsageError(f'{name} must be {{"role": ..., "content": ...}}, not {type(message).__name__}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        expected = f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"
        raise UsageError(f"{name}['role'] must be {expected}, not '{printable(role)}'")
    made: dict[str, Any] = {"role": str(role)}
    if role == "tool":
        ids = {key: str(message[key]) for key in ("name", "tool_call_id") if message.get(key)}
        return {**made, "content": result_text(content, f"{name}['content']"), **ids}
    if message.get("tool_calls"):
        if role != "assistant":
            raise UsageError(f"{name} has tool_calls: only one of role 'assistant' may")
        checked = checked_calls(message["tool_calls"], f"{name}['tool_calls']", calls)
        made["tool_calls"] = [call.to_dict() for call in checked]
        content = content or ""
    if isinstance(content, str):
        return {**made, "content": str(content)}
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UsageError(f"{name}['content'] must be a text or a list of parts, not {type(content).__name__}")
    parts: list[dict[str, str]] = []
    for index, part in enumerate(content):
        where = f"{name}['content'][{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if isinstance(part, Mapping) and kind in ATTACHMENTS:
            parts.append({"type": str(kind)})
        elif isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": str(part["text"])})
        else:
            raise UsageError(
                f'{where} must be {{"type": "text", "text": ...}}, an image or audio, '
                f"not of type '{printable(kind)}'"
            )
    return {**made, "content": parts}


def result_text(value: object, where: str = "the result") -> str:
    """What a tool returned, as text: a text as it is, other values as JSON.

    Raises:
        UsageError: the value is no JSON.
    """
    if isinstance(value, str):
        return str(value)
    if (
        isinstance(value, Sequence)
        and value
        and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value)
    ):
        return "\n".join(str(part.get("text", "")) for part in value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise UsageError(f"{where} must be a text, or a value that JSON can say") from None
