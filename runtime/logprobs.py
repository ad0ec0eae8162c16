"""Probabilities of tokens, as `generate(..., logprobs=n)` reports them, and biases of tokens' logits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.prompt.tokenizer import Tokenizer

MOST_ALTERNATIVES = 20  # as OpenAI's API has it; bounds the memory of a long answer
BLOCK = 256  # logits that are looked at together
LARGEST_BIAS = 100.0  # logits are capped at 30, so this forbids or forces a token

Bias = Mapping[int | str, float]


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its natural log-probability, before any option of sampling.

    Attributes:
        text: of the token alone; bytes that are no character become U+FFFD. A special token has its name.
        bytes: those that it adds to the answer, which may be part of a character.
        alternatives: the likeliest tokens in its place, likeliest first.
    """

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    alternatives: tuple[TokenLogprob, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """JSON values, named as in OpenAI's API: id, token, bytes, logprob, top_logprobs."""
        return {
            "id": self.token_id,
            "token": self.text,
            "bytes": list(self.bytes),
            "logprob": self.logprob,
            **({"top_logprobs": [t.to_dict() for t in self.alternatives]} if self.alternatives else {}),
        }


class LogprobRecorder:
    """Records every token that a `Sampler` picks, the end token included.

    Args:
        count: alternatives of each, 0 to 20.

    Raises:
        UsageError: `count` is out of range.
    """

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        integer = isinstance(count, Integral) and not isinstance(count, bool)
        if not (integer and 0 <= count <= MOST_ALTERNATIVES):
            raise UsageError(f"logprobs must be an integer from 0 to {MOST_ALTERNATIVES}, not {count!r}")
        self.tokens: list[TokenLogprob] = []
        self._tokenizer, self._count = tokenizer, int(count)

    def __call__(self, logits: NDArray[np.float32], token: int) -> None:
        """See `Sampler`: f32 (V,) logits of the model, and the token that was picked."""
        highest = logits.max()
        normalizer = float(highest) + math.log(float(np.exp(logits - highest).sum()))
        best = _likeliest(logits, self._count) if self._count else ()
        named = [self._named(i, float(logits[i]) - normalizer) for i in (token, *best)]
        chosen = named[0]
        self.tokens.append(
            TokenLogprob(chosen.token_id, chosen.text, chosen.bytes, chosen.logprob, tuple(named[1:]))
        )

    def _named(self, token_id: int, logprob: float) -> TokenLogprob:
        added = self._tokenizer.token_bytes(token_id)
        shown = added or self._tokenizer.token_bytes(token_id, skip_special=False)
        return TokenLogprob(token_id, shown.decode("utf-8", "replace"), added, logprob)


def _likeliest(logits: NDArray[np.float32], count: int) -> list[int]:
    """Ids of the highest logits, highest first; of equal ones, the lower id."""
    blocks = logits[: len(logits) // BLOCK * BLOCK].reshape(-1, BLOCK).max(axis=1)
    # As many blocks reach this as ids are wanted, so each of these ids does. No partition of 262,144.
    least = np.partition(blocks, -count)[-count] if len(blocks) >= count else -np.inf
    ids = np.flatnonzero(logits >= least)
    ids = ids[logits[ids] > -np.inf]
    return [int(i) for i in ids[np.argsort(-logits[ids], kind="stable")[:count]]]


def bias_by_id(bias: Bias, tokenizer: Tokenizer) -> dict[int, float]:
    """`logit_bias` by token id; a text such as "id:5" is an id, too.

    Raises:
        UsageError: names a text that is not one token, an unknown id, or a number that is out of range.
    """
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias must map tokens to numbers, not be of type {type(bias).__name__}")
    by_id: dict[int, float] = {}
    for token, value in bias.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= LARGEST_BIAS:
            raise UsageError(f"logit_bias of {token!r} must be a number from -100 to 100, not {value!r}")
        by_id[_token_id(token, tokenizer)] = float(value)
    return by_id


def _token_id(token: int | str, tokenizer: Tokenizer) -> int:
    if isinstance(token, str) and (named := re.fullmatch(r"id:([0-9]{1,9})", token)):
        token = int(named[1])
    if isinstance(token, Integral) and not isinstance(token, bool):
        if 0 <= token < tokenizer.vocab_size:
            return int(token)
        raise UsageError(f"logit_bias: token id {token} is not in the vocabulary of {tokenizer.vocab_size}")
    if not isinstance(token, str):
        raise UsageError(f"logit_bias: a token is an id or a text, not {token!r}")
    ids = tokenizer.encode(token, bos=False)
    if len(ids) != 1:
        spelled = " + ".join(repr(tokenizer.token_text(i)) for i in ids[:8]) or "nothing"
        raise UsageError(
            f"logit_bias: {token!r} is not one token but {len(ids)} ({spelled}): name them by id, as in id:5"
        )
    return ids[0]
