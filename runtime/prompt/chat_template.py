"""Messages to prompt text, through the checkpoint's chat template.

A template comes with a checkpoint, so it is somebody else's code: it runs in Jinja's immutable sandbox, and
its loops, its repetitions and what it writes are bounded. The environment otherwise offers what
`transformers` does. Not bounded is what one call of a filter makes of strings that are already near the
bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gemma_edge.runtime.errors import BundleError, UsageError, printable

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

ATTACHMENTS = ("image", "audio")  # types of content parts that a template has a placeholder for

MAX_STEPS = 100_000  # loop passes and macro calls of one rendering
WIDTH_METHODS = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"))
MAX_CHARACTERS = 32_000_000  # of the prompt and of any string on the way; a 32k context is some 150 kB

# Gemma 3's turns: a system message is folded into the first user turn, an assistant is called "model".
GEMMA3_TEMPLATE = """\
{%- macro text(message) -%}
    {%- if message['content'] is string -%}
        {{ message['content'] }}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}{{ part['text'] | trim }}
            {%- else -%}{{ '<' + part['type'] + '_soft_token>' }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = text(messages[0]) + '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') -}}
    {{ text(message) | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""


class ChatTemplate:
    """A Jinja chat template, compiled when it is first used.

    Args:
        source: the template; None takes Gemma 3's.
        path: where it came from, to name it in errors.
    """

    def __init__(self, source: str | None = None, path: str | Path = "chat_template.jinja") -> None:
        self.source, self.path = GEMMA3_TEMPLATE if source is None else source, Path(path)

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos_token: str = "<bos>",
        eos_token: str = "<eos>",
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: {"role": ..., "content": text or parts}, in order. A part is {"type": "text", "text":
                ...}, {"type": "image"} or {"type": "audio"}; what else it says of itself is ignored.

        Raises:
            UsageError: a malformed message, or messages that the template refuses (roles that do not
                alternate).
            BundleError: the template is malformed, leaves the sandbox, or does not come to an end.
        """
        import jinja2
        from jinja2.exceptions import SecurityError

        plain = normalize_messages(messages)
        pieces, size = [], 0
        template = self._template
        template.environment.steps_left = MAX_STEPS  # type: ignore[attr-defined]
        try:
            for piece in template.generate(
                messages=plain,
                bos_token=bos_token,
                eos_token=eos_token,
                add_generation_prompt=add_generation_prompt,
            ):
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise SecurityError(f"it writes more than {MAX_CHARACTERS} characters")
                pieces.append(piece)
        except _Refused as refusal:
            raise UsageError(f"the chat template refuses the messages: {printable(refusal)}") from None
        except SecurityError as error:
            raise self._error("a template that stays in its sandbox", error) from None
        except jinja2.TemplateError as error:
            raise self._error("a template that renders", error.message or type(error).__name__) from None
        except (MemoryError, RecursionError) as error:
            raise self._error("a template that comes to an end", type(error).__name__) from None
        except Exception as error:  # the template's own mistakes: 1 / 0, a missing key
            raise self._error("a template that renders", f"{type(error).__name__}: {error}") from None
        return "".join(pieces)

    def check(self) -> None:
        """Compiles the template.

        Raises:
            BundleError: the template is malformed.
        """
        _ = self._template

    @cached_property
    def _template(self) -> Template:
        import jinja2

        try:
            return _compile(self.source)
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
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: object, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f'{name} must be {{"role": ..., "content": ...}}, not {type(message).__name__}')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UsageError(f"{name}['role'] must be a text such as 'user', not {role!r}")
    if isinstance(content, str):
        return {"role": str(role), "content": str(content)}
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
                f'{where} must be {{"type": "text", "text": ...}}, an image or audio, not of type {kind!r}'
            )
    return {"role": str(role), "content": parts}


class _Refused(Exception):
    """The template called raise_exception: it is the messages that are wrong."""


def _compile(source: str) -> Template:
    """Compiles within a sandbox like transformers' (`_compile_jinja_template` of chat_template_utils.py)."""
    import jinja2
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    def bound(size: int) -> None:
        if size > MAX_CHARACTERS:
            raise SecurityError(f"it makes a value of more than {MAX_CHARACTERS} characters")

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))
        steps_left = MAX_STEPS

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sized = [len(value) for value in (left, right) if isinstance(value, (str, list, tuple))]
            numbers = [value for value in (left, right) if isinstance(value, int)]
            if operator == "+":
                bound(sum(sized))
            elif operator == "%" and sized:
                raise SecurityError("it formats with %")
            elif operator == "*" and sized and numbers:
                bound(sized[0] * numbers[0])
            elif operator == "**" and len(numbers) == 2:
                bound(left.bit_length() * right)
            elif operator == "*" and len(numbers) == 2:
                bound(left.bit_length() + right.bit_length())
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, str) and attr in WIDTH_METHODS:  # a width can fill the memory with spaces
                return False
            return super().is_safe_attribute(obj, attr, value)

        def step(self) -> str:
            """Called by every loop pass and macro, until they are too many."""
            self.steps_left -= 1
            if self.steps_left < 0:
                raise SecurityError(f"it takes more than {MAX_STEPS} steps")
            return ""

        def concat_bounded(self, *parts: Any) -> str:
            texts = [str(part) for part in parts]
            bound(sum(map(len, texts)))
            return "".join(texts)

    class Generation(Extension):
        """`{% generation %}` marks the assistant's tokens for training; here it is transparent."""

        tags = frozenset(("generation",))  # type: ignore[assignment]

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Bounds(NodeTransformer):
        """Makes loop passes and macro calls count as steps, and `~` check the length of its result.

        An EnvironmentAttribute is a name that a template cannot write, and so cannot redefine.
        """

        def count_steps(self, node: Any) -> nodes.Node:
            self.generic_visit(node)
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            node.body.insert(0, nodes.Output([step], lineno=node.lineno))
            return cast(nodes.Node, node)

        visit_For = visit_Macro = visit_CallBlock = count_steps

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return nodes.Call(nodes.EnvironmentAttribute("concat_bounded"), node.nodes, [], None, None)

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"it stores {name!r} in a namespace")
            super().__setitem__(name, value)

    def namespace(*args: Any, **values: Any) -> Namespace:
        made = Namespace()
        for name, value in dict(*args, **values).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise _Refused(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=None if indent is None else min(indent, 16),
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's own: at most 100,000 long
        "dict": dict,
        "namespace": namespace,
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    environment.filters["tojson"] = tojson
    for name in ("center", "format"):
        del environment.filters[name]
    tree = Bounds().visit(environment.parse(source))
    return environment.from_string(tree.set_environment(environment))
