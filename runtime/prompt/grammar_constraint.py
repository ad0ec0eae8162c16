"""Answers held to a grammar, by llguidance over our own tokenizer.

llguidance is an extra, `structured`. It gets the bytes of every token, so nothing but our SentencePiece
vocabulary is loaded; its limits bound what a grammar can cost.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import UsageError, printable
from gemma_edge.runtime.install_hint import install_hint
from gemma_edge.runtime.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Bytes of a source. llguidance's limits bound the rest; it takes long for longer expressions.
MAX_BYTES = {"json_schema": 1 << 20, "regex": 1 << 14, "lark": 1 << 16}
SEARCHED_BYTES = 1 << 18  # compiled to find where a schema is wrong
STACK = 256 << 20  # bytes, most never touched: llguidance recurses into chains of rules
DEFINITIONS = ("$defs", "definitions")
KEPT = 16  # compiled grammars
_STACK_SIZE = threading.Lock()
SPECIAL = b"\xff"  # in front of a token that no text is
# No free white space: at a high temperature a model would write nothing else.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Grammar:
    """A form for an answer.

    Attributes:
        kind: what `source` is.
        source: a JSON schema as JSON, a regular expression as Rust's regex crate has it (no look-around), or
            a grammar in llguidance's dialect of Lark.
        name: what the caller calls it, for errors.
        own: it was written here, and may be larger than one of somebody else.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str
    name: str
    own: bool = False


class Grammars:
    """Compiles grammars for one vocabulary.

    Args:
        end_ids: ids that end an answer; allowed wherever the grammar is complete.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        self.tokenizer, self.end_ids = tokenizer, sorted(end_ids)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, grammar: Grammar) -> GrammarConstraint:
        """A new constraint, at the beginning of an answer.

        Raises:
            UsageError: llguidance is not installed, or the grammar is malformed, too large, or allows no
                answer; of a JSON schema, the message has the path to the part that is wrong.
        """
        with self._lock:  # requests are prepared in threads of their own
            if grammar not in self._compiled:
                self._compiled[grammar] = _on_large_stack(lambda: self._compile(grammar))
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            matcher = self._compiled[grammar].deep_copy()
        return GrammarConstraint(matcher, self.tokenizer.vocab_size, grammar.name)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        """What llguidance needs of the tokenizer. Of 262,144 ids it takes about a second, and 20 MB."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise UsageError(
                "holding answers to a form needs the package llguidance: "
                f"install it with {install_hint('structured')}"
            ) from None
        if not self.end_ids:
            raise UsageError("holding answers to a form needs an end token, and the bundle names none")
        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self.tokenizer, self.end_ids)), eos_token=self.end_ids
        )

    def _compile(self, grammar: Grammar) -> LLMatcher:
        vocabulary = self._vocabulary
        try:
            size = len(grammar.source.encode("utf-8"))
        except UnicodeEncodeError as problem:
            raise UsageError(f"{grammar.name} is not valid Unicode at character {problem.start}") from None
        most = MAX_BYTES["json_schema" if grammar.own else grammar.kind]
        if size > most:
            raise UsageError(f"{grammar.name} has more than {most:,} bytes: make it smaller")
        matcher = _matcher(vocabulary, grammar)
        if (error := matcher.get_error()) and grammar.kind == "json_schema":
            path = _failing_path(vocabulary, json.loads(grammar.source), error)
            raise UsageError(f"{grammar.name}{path} cannot be held: {_reason(error)}")
        if error:
            raise UsageError(f"{grammar.name} cannot be compiled: {_reason(error)}")
        beginning = matcher.deep_copy()
        beginning.compute_bitmask()
        if beginning.is_stopped() and not beginning.is_accepting():
            raise UsageError(f"{grammar.name} allows no answer at all")
        return matcher


class GrammarConstraint:
    """A `Constraint` by an LLMatcher."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, name: str) -> None:
        self._matcher, self._size, self._name = matcher, vocab_size, name

    def allowed(self) -> NDArray[np.bool_]:
        """See `Constraint`.

        Raises:
            UsageError: the grammar has become too complex for its limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)
        return mask

    def accept(self, token: int) -> None:
        """See `Constraint`. Raises as `allowed`."""
        self._matcher.consume_token(token)
        self._check()

    def fitting(self, tokens: Sequence[int]) -> int:
        """See `Constraint`."""
        return int(self._matcher.validate_tokens(list(tokens)))

    def rollback(self, count: int) -> None:
        """See `Constraint`."""
        self._matcher.rollback(count)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"{self._name} cannot be held any further: {_reason(self._matcher.get_error())}")


class _Vocabulary:
    """The attributes that llguidance's TokenizerWrapper reads."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end_ids[0], tokenizer.bos_id
        self.special_token_ids: list[int] = []
        self.tokens = [self._bytes(token) for token in range(tokenizer.vocab_size)]

    def _bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token) or SPECIAL + self._tokenizer.token_text(token).encode()

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8"), bos=False)


def _matcher(vocabulary: LLTokenizer, grammar: Grammar) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    if grammar.kind == "json_schema":
        source = LLMatcher.grammar_from_json_schema(grammar.source, defaults=JSON_FORM)  # type: ignore[arg-type]
    elif grammar.kind == "regex":
        source = LLMatcher.grammar_from_regex(grammar.source)
    else:
        source = LLMatcher.grammar_from_lark(grammar.source)
    return LLMatcher(vocabulary, source, log_level=0, limits=LLParserLimits(verbose_errors=False))


def _on_large_stack(work: Callable[[], LLMatcher]) -> LLMatcher:
    """What `work` returns, done in a thread with room to recurse."""
    made: list[LLMatcher | BaseException] = []

    def run() -> None:
        try:
            made.append(work())
        except BaseException as error:  # raised where it is waited for
            made.append(error)

    with _STACK_SIZE:  # the size is that of every thread made meanwhile
        before = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=run)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


def _failing_path(vocabulary: LLTokenizer, root: dict[str, Any], error: str) -> str:
    """The path to the innermost part of a schema that fails alone with the same error, as ".properties.x"."""
    shared = {name: root[name] for name in DEFINITIONS if name in root}
    path, part = "", root
    left = SEARCHED_BYTES // (1 + len(json.dumps(root)))
    while left > 0:
        for step, inner in _parts(part):
            left -= 1
            grammar = Grammar("json_schema", json.dumps({**shared, **inner}), "")
            if left > 0 and _matcher(vocabulary, grammar).get_error() == error:
                path, part = path + step, inner
                break
        else:
            break
    return path


def _parts(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The schemas directly inside one; not `true` and `false`, which llguidance does not take alone."""
    found: list[tuple[str, Any]] = []
    for name, inner in schema.items():
        if name in ("properties", "patternProperties", "$defs", "definitions") and isinstance(inner, dict):
            found += [(f".{name}.{printable(key, 60)}", value) for key, value in inner.items()]
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(inner, list):
            found += [(f".{name}[{index}]", value) for index, value in enumerate(inner)]
        elif name in ("items", "additionalProperties"):
            found.append((f".{name}", inner))
    return [(step, inner) for step, inner in found if isinstance(inner, dict)]


def _reason(error: str) -> str:
    """llguidance's message, without the state that it may append."""
    return printable(" ".join(error.split("<state>")[0].split()))
