"""Jinja for templates of strangers: its immutable sandbox, with every value paid for from one budget.

Whatever a template makes - a piece of output inside any block, a concatenation, a list, the result of an
operator, a slice, a filter, a test or a call - is charged, before it is made where it can be large. What is
compared, hashed or written is charged too: lists within lists double with each level. `Budget` bounds bytes,
steps and seconds of one rendering; each of them ends in jinja2's SecurityError. What no chat template needs
and what has no cheap bound is refused: automatic escaping, `encode`, methods that fill up to a width. The
rest is as in transformers' `_compile_jinja_template`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from datetime import datetime
from functools import wraps
from typing import Any, cast

import jinja2
import jinja2.meta
from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

MAX_STEPS = 100_000  # loop passes and macro calls
MAX_BYTES = 48 << 20  # of all values made on the way, the text among them. A 32k context is some 150 kB
MAX_SECONDS = 1.0  # of this thread's CPU
MAX_SOURCE = 1 << 17  # characters; Gemma's has 1,500, the longest published ones 20,000
MAX_INTEGER_BITS = 4096
MAX_WIDTH = 1000  # of an integer that a filter or a method is given
MAX_SEARCH = 10**8  # characters that a search from the right, or a strip, compares
MAX_SEPARATOR = 16  # characters between the values of a JSON text
PIECE_BYTES = 64  # what a piece of output costs beside its text
ITEM_BYTES = 96  # what an item that a generator makes costs: a character of its own, and its place in a list

# Methods that fill up to a width, that make a text or a number of any size, or that take a codec.
REFUSED_METHODS = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"))
REFUSED_METHODS |= {"encode", "translate", "maketrans", "fromkeys", "fromhex", "from_bytes", "to_bytes"}
# Filters that fill, format, or search by expressions whose time is no line.
REFUSED_FILTERS = ("center", "format", "wordwrap", "urlize", "pprint", "xmlattr")
# What filters and methods make of a text, in times its bytes: 1 unless told. A few have rules of their own.
GROWTH = {"tojson": 24, "title": 64, "striptags": 24, "wordcount": 16, "urlencode": 16}
GROWTH |= dict.fromkeys(("int", "float", "filesizeformat"), 16)  # an error says the text
GROWTH |= dict.fromkeys(("escape", "e", "forceescape"), 6)
GROWTH |= dict.fromkeys(("str.split", "str.rsplit", "str.splitlines"), 24)
GROWTH |= dict.fromkeys(("upper", "lower", "capitalize"), 3)
GROWTH |= {f"str.{name}": 3 for name in ("upper", "lower", "capitalize", "casefold", "title", "swapcase")}
# What they take beside it for each item of a list, or character of a text: as measured, rounded up.
BYTES_OF_ITEMS = {"list": 96, "join": 96, "batch": 224, "slice": 224, "unique": 224, "dictsort": 160}
BYTES_OF_ITEMS |= {"sort": 256, "groupby": 512, "str.join": 96, "dict": 128, "namespace": 128}
SEARCHES = frozenset(("trim", "str.strip", "str.lstrip", "str.rstrip"))
SEARCHES |= {"str.rfind", "str.rindex", "str.rsplit", "str.rpartition"}
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
CONTAINERS = (str, list, tuple, dict)
VIEWS = (KeysView, ValuesView, ItemsView)
WEIGHED = (*CONTAINERS, *VIEWS, jinja2.utils.Namespace)


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
                if total + 16 * len(item) <= self.bytes:  # else it is refused below
                    stack += item
                total += 16 * len(item)
            elif isinstance(item, jinja2.utils.Namespace):
                stack.append(object.__getattribute__(item, "_Namespace__attrs"))
            elif isinstance(item, int):
                total += item.bit_length() // 3
            total += 16
            if total > self.bytes:
                raise SecurityError(f"it makes values of more than {MAX_BYTES} bytes")
        return total


def result_bound(budget: Budget, name: str, values: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Bytes that a filter, a test, or a method such as "str.join" takes at most for these arguments."""
    every = (*values, *options.values())
    if any(isinstance(value, int) and not -MAX_WIDTH <= value <= MAX_WIDTH for value in every[1:]):
        raise SecurityError(f"it asks {name} for more than {MAX_WIDTH}")
    weight = sum(budget.weigh(value) for value in every if isinstance(value, WEIGHED))
    if any(isinstance(value, Markup) for value in every):
        weight *= GROWTH["escape"]  # it escapes what is added
    first = values[0] if values else ""
    texts = [value for value in every[1:] if isinstance(value, str)]
    if name in SEARCHES and length(first) * max(map(len, texts), default=0) > MAX_SEARCH:
        raise SecurityError(f"it asks {name} to compare more than {MAX_SEARCH} characters")
    if name == "sum" and any(isinstance(value, (*CONTAINERS, Iterator)) for value in every[1:]):
        raise SecurityError("it sums what are no numbers")
    bound = weight * GROWTH.get(name, 1)
    if name.endswith("replace") and isinstance(first, str) and len(texts) > 1:
        count = first.count(texts[0]) if texts[0] else len(first) + 1
        bound += count * text_bytes(texts[1])
    if name == "indent":
        text = str(first)
        widths = [len(value) if isinstance(value, str) else value for value in every[1:]]
        lines = sum(map(text.count, LINE_ENDS)) + 2
        bound += lines * (PIECE_BYTES + 4 * max([4, *(w for w in widths if isinstance(w, int))]))
    if name == "tojson" and (options.get("indent") or len(values) > 2):
        bound += weight * depth(first)  # at most 16 spaces a level, before each value of 16 bytes
    items = every[1] if name == "str.join" and len(every) > 1 else first
    if name.endswith("join"):
        bound += length(items) * sum(4 * len(text) for text in (texts if items is first else [first]))
    return bound + length(items) * BYTES_OF_ITEMS.get(name, 0)


def length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def depth(value: Any) -> int:
    """Levels of lists and dicts within each other."""
    levels, level = 0, [value]
    while level := [item for item in level if isinstance(item, (list, tuple, dict))]:
        level = [value for item in level for value in (item.values() if isinstance(item, dict) else item)]
        levels += 1
    return levels


def text_bytes(text: str) -> int:
    """Bytes of its characters."""
    return len(text) if text.isascii() else 4 * len(text)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    budget: Budget
    undeclared: frozenset[str] = frozenset()  # of its caller; known where one may be `tools`

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
        escapes = GROWTH["escape"] if any(isinstance(value, Markup) for value in sized) else 1
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "%" and sized:
            raise SecurityError("it formats with %")
        if sized:
            size = escapes * sum(self.size(value) for value in sized)
            self.budget.charge(size * max(1, numbers[0]) if operator == "*" and numbers else size)
        bits = sum(number.bit_length() for number in numbers)
        if operator == "**" and len(numbers) == 2:
            bits = left.bit_length() * max(0, right)
        if bits > MAX_INTEGER_BITS:
            raise SecurityError(f"it makes a number of more than {MAX_INTEGER_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **options: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if owner is self:  # what `Bounds` put there
            return obj(*args)
        if isinstance(owner, CONTAINERS):
            kind = next(kind.__name__ for kind in CONTAINERS if isinstance(owner, kind))
            args = tuple(self.whole(value) for value in args)
            name = f"{kind}.{getattr(obj, '__name__', '')}"
            self.budget.charge(result_bound(self.budget, name, (owner, *args), options))
        elif not isinstance(obj, (Macro, LoopContext, BlockReference)):  # these take values as they are
            args = tuple(self.whole(value) for value in args)
            name = getattr(obj, "__name__", "")
            self.budget.charge(result_bound(self.budget, name, args, options))
        self.budget.check_time()
        return super().call(context, obj, *args, **options)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in REFUSED_METHODS or (isinstance(obj, Markup) and not hasattr(str, attr)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """None: `format` is refused like the other methods that take a width, not made safe as Jinja does."""

    def whole(self, value: Any) -> Any:
        """The items that a generator makes, as a list, paid for; other values as they are."""
        return list(self.paying(value)) if isinstance(value, Iterator) else value

    def paying(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.charge(ITEM_BYTES)
            yield item

    # Called by the compiled template, see `Bounds`. ------------------------------------------------------

    @staticmethod
    def size(value: Any) -> int:
        return text_bytes(value) if isinstance(value, str) else 8 * len(value)

    def step(self, pieces: int) -> str:
        """Every loop pass and macro call, before its body."""
        self.budget.step()
        self.budget.charge(pieces * PIECE_BYTES)
        return ""

    def tried(self) -> bool:
        """Every item that the condition of a loop looks at."""
        self.budget.step()
        self.budget.charge(ITEM_BYTES)
        return True

    def paid(self, value: Any) -> Any:
        """A value that was just made, or that is about to be compared, hashed or written."""
        if isinstance(value, str):
            self.budget.charge(self.size(value))
        elif isinstance(value, WEIGHED):
            self.budget.charge(self.budget.weigh(value))
        return value

    def made(self, value: Any) -> Any:
        """A list, tuple or dict that the template writes out; what is in it was paid for."""
        self.budget.charge(PIECE_BYTES + len(value) * (128 if isinstance(value, dict) else 8))
        return value

    def unpacked(self, value: Any) -> Any:
        """`*value` or `**value` in a call."""
        value = self.whole(value)
        self.budget.charge(ITEM_BYTES * length(value))
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
        """A filter or a test that is paid for before it runs, and then for each item that it makes later."""

        @wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            skip = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0
            if name in BYTES_OF_ITEMS:
                args = (*args[:skip], *map(self.whole, args[skip:]))
            self.budget.charge(result_bound(self.budget, name, args[skip:], options))
            result = function(*args, **options)
            return self.paying(result) if isinstance(result, Iterator) else result

        return run


class Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it is transparent."""

    tags = frozenset(("generation",))  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Bounds(NodeTransformer):
    """Makes the template call what `Sandbox` has for it.

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

    visit_Macro = visit_CallBlock = count_steps

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.count_steps(node)
        if node.test is not None:
            node.test = nodes.And(self.call("tried"), node.test)
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError("it switches escaping on")

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else self.call("made", node)

    visit_Tuple = visit_List

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        for pair in node.items:
            if not isinstance(pair.key, nodes.Const):
                pair.key = self.call("paid", pair.key)
        return self.visit_List(node)

    def unpack(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        for name in ("dyn_args", "dyn_kwargs"):
            if getattr(node, name) is not None:
                setattr(node, name, self.call("unpacked", getattr(node, name)))
        return cast(nodes.Node, node)

    visit_Call = visit_Filter = visit_Test = unpack

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
        if isinstance(node.arg, nodes.Slice):
            return self.call("paid", node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = self.call("paid", node.arg)  # it is hashed
        return node

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


def namespace(*args: Any, **values: Any) -> Namespace:
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
    if separators is not None and any(len(text) > MAX_SEPARATOR for text in separators):
        raise SecurityError(f"it separates values by more than {MAX_SEPARATOR} characters")
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
        "namespace": namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.filters["tojson"] = _tojson
    for name in REFUSED_FILTERS:
        del environment.filters[name]
    for functions in (environment.filters, cast(dict[str, Any], environment.tests)):
        for name, function in functions.items():
            functions[name] = environment.guarded(name, function)
    # A tree of its own: what looks for variables computes constants on the way, and takes half of the time.
    if "tools" in source:
        environment.undeclared = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
    tree = Bounds().visit(environment.parse(source))
    return environment.from_string(tree.set_environment(environment))
