"""Jinja for templates of strangers: its immutable sandbox, with every value paid for from one budget.

Whatever a template makes - a piece of output inside any block, a concatenation, the result of an operator, a
slice, a filter or a call - is charged, before it is made where it can be large. `Budget` bounds bytes, steps
and seconds of one rendering; each of them ends in jinja2's SecurityError. The rest is as in transformers'
`_compile_jinja_template`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from datetime import datetime
from functools import wraps
from typing import Any, cast

import jinja2
import jinja2.meta
from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 100_000  # loop passes and macro calls
MAX_BYTES = 48 << 20  # of all values made on the way, the text among them. A 32k context is some 150 kB
MAX_SECONDS = 1.0  # of this thread's CPU
MAX_SOURCE = 1 << 17  # characters; Gemma's has 1,500, the longest published ones 20,000
MAX_INTEGER_BITS = 4096
MAX_WIDTH = 1000  # of an integer that a filter or a method is given
PIECE_BYTES = 64  # what a piece of output costs beside its text

WIDTH_METHODS = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"))
# Filters that fill, format, or search by expressions whose time is no line.
REFUSED_FILTERS = ("center", "format", "wordwrap", "urlize", "pprint", "xmlattr")
# What filters and methods make of a text, in times its length: 1 unless told. A few have rules of their own.
GROWTH = {"escape": 6, "e": 6, "forceescape": 6, "tojson": 24, "list": 8, "sort": 8}
GROWTH |= dict.fromkeys(("batch", "slice", "groupby"), 96)  # a list or a tuple for each character
GROWTH |= {
    "str.split": 16,
    "str.splitlines": 16,
    "str.rsplit": 16,
    "upper": 3,
    "str.upper": 3,
    "str.encode": 3,
}
CONTAINERS = (str, list, tuple, dict)
VIEWS = (KeysView, ValuesView, ItemsView)


class Refused(Exception):
    """The template called raise_exception: it is the messages that are wrong."""


class Budget:
    """What is left of one rendering."""

    def __init__(self) -> None:
        self.steps, self.bytes, self.end = MAX_STEPS, MAX_BYTES, time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        self.check_time()

    def check_time(self) -> None:
        if time.thread_time() > self.end:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} s")

    def charge(self, size: int) -> None:
        """Takes `size` bytes, or raises."""
        self.bytes -= size
        if self.bytes < 0:
            raise SecurityError(f"it makes values of more than {MAX_BYTES} bytes")
        self.check_time()

    def weigh(self, value: Any) -> int:
        """Bytes that `value` would take as text, with all that is in it; raises beyond what is left."""
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                total += text_bytes(item)
            elif isinstance(item, dict):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, *VIEWS)):
                stack += item
            elif isinstance(item, jinja2.utils.Namespace):
                stack.append(object.__getattribute__(item, "_Namespace__attrs"))
            elif isinstance(item, bytes):
                total += 4 * len(item)
            elif isinstance(item, int):
                total += item.bit_length() // 3
            total += 16
            if total > self.bytes:
                raise SecurityError(f"it makes values of more than {MAX_BYTES} bytes")
        return total


def result_bound(budget: Budget, name: str, values: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Bytes that a filter, or a method such as "str.join", makes at most of these arguments."""
    every = (*values, *options.values())
    if any(isinstance(value, int) and not -MAX_WIDTH <= value <= MAX_WIDTH for value in every[1:]):
        raise SecurityError(f"it asks {name} for more than {MAX_WIDTH}")
    weight = sum(budget.weigh(value) for value in every if isinstance(value, CONTAINERS))
    text = values[0] if values else ""
    texts = [value for value in every[1:] if isinstance(value, str)]
    if name.endswith("replace") and isinstance(text, str) and len(texts) > 1:
        count = text.count(texts[0]) if texts[0] else len(text) + 1
        return weight + count * text_bytes(texts[1])
    if name == "str.join":
        return weight + len(every[1]) * text_bytes(text) if isinstance(every[1], CONTAINERS) else weight
    if name == "join":
        count = len(text) if isinstance(text, CONTAINERS) else MAX_STEPS
        return weight + count * sum(map(len, texts)) * 4
    if name == "indent":
        widths = [len(value) if isinstance(value, str) else value for value in every[1:]]
        lines = str(text).count("\n") + 2
        return weight + 4 * lines * max([4, *(w for w in widths if isinstance(w, int))])
    return weight * GROWTH.get(name, 1)


def text_bytes(text: str) -> int:
    """Bytes of its characters."""
    return len(text) if text.isascii() else 4 * len(text)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    budget: Budget
    undeclared: frozenset[str] = frozenset()  # names that the template expects of its caller

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "%" and sized:
            raise SecurityError("it formats with %")
        if sized:
            size = sum(self.size(value) for value in sized)
            self.budget.charge(size * max(1, numbers[0]) if operator == "*" and numbers else size)
        bits = sum(number.bit_length() for number in numbers)
        if operator == "**" and len(numbers) == 2:
            bits = left.bit_length() * max(0, right)
        if bits > MAX_INTEGER_BITS:
            raise SecurityError(f"it makes a number of more than {MAX_INTEGER_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **options: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, CONTAINERS):
            name = f"{type(owner).__name__}.{getattr(obj, '__name__', '')}"
            self.budget.charge(result_bound(self.budget, name, (owner, *args), options))
        self.budget.check_time()
        return super().call(context, obj, *args, **options)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in WIDTH_METHODS:  # a width can fill the memory with spaces
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """None: `format` is refused like the other methods that take a width, not made safe as Jinja does."""

    # Called by the compiled template, see `Bounds`. ------------------------------------------------------

    @staticmethod
    def size(value: Any) -> int:
        return text_bytes(value) if isinstance(value, str) else 8 * len(value)

    def step(self, pieces: int) -> str:
        """Every loop pass and macro call, before its body."""
        self.budget.step()
        self.budget.charge(pieces * PIECE_BYTES)
        return ""

    def paid(self, value: Any) -> Any:
        """A value that was just made, or that is about to be compared or written."""
        if isinstance(value, str):
            self.budget.charge(self.size(value))
        elif isinstance(value, (*CONTAINERS, *VIEWS, jinja2.utils.Namespace, bytes)):
            self.budget.charge(self.budget.weigh(value))
        return value

    def concat(self, parts: Iterable[str]) -> str:
        """The text of a block; each piece was paid for as it was written, the whole is another copy."""
        texts = list(parts)
        self.budget.charge(sum(map(self.size, texts)))
        return "".join(texts)

    def joined(self, *parts: Any) -> str:
        """`a ~ b`."""
        return "".join(str(self.paid(part)) for part in parts)

    def guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is paid for before it runs."""

        @wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            skip = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0
            self.budget.charge(result_bound(self.budget, name, args[skip:], options))
            return function(*args, **options)

        return run


class Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it is transparent."""

    tags = frozenset(("generation",))  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Bounds(NodeTransformer):
    """Makes the template call `Sandbox.step`, `paid` and `joined`.

    An EnvironmentAttribute is a name that a template cannot write, and so cannot redefine.
    """

    @staticmethod
    def call(name: str, *values: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), list(values), [], None, None)

    def count_steps(self, node: Any) -> nodes.Node:
        pieces = 1 + sum(len(output.nodes) for output in node.find_all(nodes.Output))
        self.generic_visit(node)
        step = self.call("step", nodes.Const(pieces))
        node.body.insert(0, nodes.Output([step], lineno=node.lineno))
        return cast(nodes.Node, node)

    visit_For = visit_Macro = visit_CallBlock = count_steps

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else self.call("paid", part) for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self.call("joined", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self.call("paid", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self.call("paid", node.expr)
        for operand in node.ops:
            operand.expr = self.call("paid", operand.expr)
        return node


class Namespace(jinja2.utils.Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it stores {name!r} in a namespace")
        super().__setitem__(name, value)


def _namespace(*args: Any, **values: Any) -> Namespace:
    made = Namespace()
    for name, value in dict(*args, **values).items():
        made[name] = value
    return made


def _raise_exception(message: str) -> None:
    raise Refused(message)


def _tojson(
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


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"%[-_0^#]*\d", form):  # a width
        raise SecurityError("it asks strftime_now for more than a date")
    return datetime.now().strftime(form)


def compile_template(source: str) -> Template:
    """Compiles a template.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
        SecurityError: it is too long.
    """
    if len(source) > MAX_SOURCE:
        raise SecurityError(f"it has more than {MAX_SOURCE} characters")
    # Without the optimizer, which would compute constants while it compiles.
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], optimized=False
    )
    environment.budget = Budget()
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's own: at most 100,000 long
        "dict": dict,
        "namespace": _namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.filters["tojson"] = _tojson
    for name in REFUSED_FILTERS:
        del environment.filters[name]
    for name, function in environment.filters.items():
        environment.filters[name] = environment.guarded(name, function)
    parsed = environment.parse(source)
    environment.undeclared = frozenset(jinja2.meta.find_undeclared_variables(parsed))
    tree = Bounds().visit(parsed)
    return environment.from_string(tree.set_environment(environment))
