"""The task of one measured process, as data that crosses a process or a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.typed_json import from_json, to_json

QUESTION_TOKENS = 24  # behind a measured prefix


class Sizes(NamedTuple):
    """One test of llama-bench's kind; exactly one of n_prompt and n_gen is not 0."""

    n_prompt: int
    n_gen: int
    n_depth: int


@dataclass(frozen=True)
class Workload:
    """The steps of one process with one bundle, in this order.

    `cold` drops the page cache of the bundle first. Then it is loaded; all combinations of `prompts` and
    `gens` with `depths` are measured `reps` times; `requests` answers end to end, each of `answer` tokens to
    a prompt of `prompt`; at last, for `sustained_s` seconds, prefill and decode in turn.

    With `encode` the decoder is not loaded: the bundle's encoders are, one after the other, and each encodes
    `reps` times. With `attach`, files on the machine of the process, one answer to a prompt with them is
    measured phase by phase: at least `prompts[0]` tokens, then `gens[0]` decoded. With `prefix`, prompts
    behind so many tokens are started without the prefix cache and with it, `reps` times each. With
    `speculate`, answers of so many tokens are decoded without drafts and with them, `reps` times each.
    """

    prompts: tuple[int, ...] = ()
    gens: tuple[int, ...] = ()
    depths: tuple[int, ...] = (0,)
    reps: int = 5
    threads: int = 2
    context: int | None = None  # None: what the bundle was planned for
    chunk: int | None = None  # tokens of a prefill call; None: as `Model.load` has it
    cold: bool = False
    import_time: bool = False
    requests: int = 0
    prompt: int = 128
    answer: int = 64
    sustained_s: float = 0.0
    encode: bool = False
    attach: tuple[str, ...] = ()
    prefix: int = 0
    speculate: int = 0

    def tests(self) -> Iterator[Sizes]:
        """In llama-bench's order: depth by depth, prefill before decode."""
        for depth in self.depths:
            yield from (Sizes(n, 0, depth) for n in self.prompts if n)
            yield from (Sizes(0, n, depth) for n in self.gens if n)

    @property
    def n_prompt(self) -> int:
        """Tokens of the largest prefill."""
        return max(self.prompts, default=0)

    @property
    def n_gen(self) -> int:
        """Tokens of the largest decode."""
        return max(self.gens, default=0)

    @property
    def longest(self) -> int:
        """Tokens that the KV cache must hold for the longest test."""
        sizes = [test.n_prompt + test.n_gen + test.n_depth for test in self.tests()]
        if self.requests:
            sizes.append(self.prompt + self.answer)
        if self.sustained_s:
            sizes.append(self.n_prompt + self.n_gen)
        if self.prefix:
            sizes.append(self.prefix + QUESTION_TOKENS + 1)
        if self.speculate:
            sizes.append(2 * self.speculate + 1)
        return max(sizes, default=0)

    def check(self, context: int) -> None:
        """Raises UsageError for what cannot be measured with a KV cache of `context` tokens."""
        if min((*self.prompts, *self.gens, *self.depths), default=0) < 0:
            raise UsageError("-p, -n and -d: expected numbers of tokens, 0 for no such test")
        if min(self.reps, self.threads, self.prompt) < 1 or self.requests < 0:
            raise UsageError("-r, -t and --prompt: expected at least 1; --requests: 0 or more")
        if self.requests and self.answer < 2:
            raise UsageError("--tokens: expected at least 2, or no gap between tokens can be measured")
        if self.sustained_s and not any(self.gens):
            raise UsageError("--sustained needs -n: the tokens to decode in each turn")
        if self.longest > context:
            remedy = "raise --context, or lower -p, -n, -d, --prompt, --tokens, --prefix or --speculate"
            raise UsageError(f"{self.longest} tokens do not fit a context of {context}: {remedy}")

    def to_json(self) -> str:
        return json.dumps(to_json(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """Raises UsageError for anything that `to_json` did not write."""
        try:
            return from_json(cls, json.loads(text))
        except ValueError as error:
            raise UsageError(f"not a workload: {error}") from None
