"""Logits to the next token id.

The order is that of `transformers`: biases, repetition penalty, temperature, top-k, top-p, min-p. Each looks
only at what the one before it kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.constraint import Constraint
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The defaults are those that Google recommends for Gemma 3n.

    Args:
        temperature: divides the logits; 0 is greedy (the first of the highest logits).
        top_k: keep the k highest logits, and those equal to the last of them; 0 keeps all.
        top_p: keep the most probable tokens until their probabilities reach this sum; 1 keeps all.
        min_p: drop tokens less probable than this fraction of the most probable one; 0 keeps all.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely; 1 is off.
        seed: of the random generator; None takes a new one each time.

    Raises:
        UsageError: an option is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise UsageError(f"{name} must be {expected}, not {getattr(self, name)!r}")

        check("temperature", _is_number(self.temperature) and self.temperature >= 0, "a number of 0 or more")
        check("top_k", _is_integer(self.top_k) and self.top_k >= 0, "an integer of 0 (off) or more")
        check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1")
        check("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1")
        penalty = self.repetition_penalty
        check("repetition_penalty", _is_number(penalty) and penalty > 0, "a number above 0")
        seed_ok = self.seed is None or (_is_integer(self.seed) and self.seed >= 0)
        check("seed", seed_ok, "an integer of 0 or more")


class Sampler:
    """Picks tokens; one random generator, so that a seed fixes the whole answer.

    Args:
        bias: is added to the logits of these ids.
        observe: is told of every pick: the logits as they came, and the token.
        constraint: says which tokens may be picked; it goes on with each pick.

    Attributes:
        mask_s: seconds that the constraint took so far.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        bias: Mapping[int, float] | None = None,
        observe: Callable[[NDArray[np.float32], int], None] | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._biased = np.array([*(bias or {})], np.int64)
        self._bias = np.array([*(bias or {}).values()], np.float32)
        self._observe, self._constraint = observe, constraint
        self.mask_s = 0.0

    def pick(self, logits: NDArray[np.float32], history: Collection[int] = ()) -> int:
        """The next token id.

        Args:
            logits: f32 (V,), left as it is. -inf forbids a token.
            history: ids of the prompt and the answer so far, for the repetition penalty.

        Raises:
            GemmaEdgeError: the logits hold NaN or +inf, or forbid every token.
        """
        ids, weights = self._kept(self._adjusted(logits, history))
        cumulative = np.cumsum(weights)
        index = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        token = int(ids[min(int(index), len(ids) - 1)])
        if self._constraint is not None:
            started = time.perf_counter()
            self._constraint.accept(token)
            self.mask_s += time.perf_counter() - started
        if self._observe is not None:
            self._observe(logits, token)
        return token

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` the constraint lets follow; all of them without one."""
        if self._constraint is None:
            return len(tokens)
        started = time.perf_counter()
        count = self._constraint.fitting(tokens)
        self.mask_s += time.perf_counter() - started
        return count

    def distribution(self, logits: NDArray[np.float32], history: Collection[int] = ()) -> tuple[Ids, Floats]:
        """The ids that may be picked and their probabilities, which sum to 1. Arguments as for `pick`."""
        ids, weights = self._kept(self._adjusted(logits, history))
        return ids, weights / weights.sum()

    def _adjusted(self, logits: NDArray[np.float32], history: Collection[int]) -> NDArray[np.float32]:
        """The logits with biases, the repetition penalty and the constraint; a copy if there are any."""
        return self._masked(self._biased_logits(logits, history))

    def _biased_logits(self, logits: NDArray[np.float32], history: Collection[int]) -> NDArray[np.float32]:
        penalty = self.sampling.repetition_penalty
        penalized = penalty != 1 and bool(history)
        if not (penalized or len(self._biased)):
            return logits
        logits = logits.copy()
        logits[self._biased] += self._bias
        if penalized:
            seen = np.unique(np.fromiter(history, np.int64, len(history)))
            values = logits[seen]
            logits[seen] = np.where(values < 0, values * penalty, values / penalty)
        return logits

    def _masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits, -inf where the constraint forbids a token."""
        if self._constraint is None:
            return logits
        started = time.perf_counter()
        allowed = self._constraint.allowed()
        size = min(len(allowed), len(logits))
        masked = np.full_like(logits, -np.inf)
        np.copyto(masked[:size], logits[:size], where=allowed[:size])
        self.mask_s += time.perf_counter() - started
        return masked

    def _kept(self, logits: NDArray[np.float32]) -> tuple[Ids, Floats]:
        """Ids that may be picked, and their weights: exp(logit - highest) over the temperature."""
        s, size = self.sampling, logits.shape[0]
        if s.temperature == 0:
            best = np.argmax(logits)
            _check_highest(float(logits[best]))
            return np.array([best]), np.ones(1)
        highest = float(logits.max())  # NaN, if there is one
        _check_highest(highest)
        if 0 < s.top_k < size:
            # As in transformers, what equals the k-th highest stays. A partition is enough: no sort of
            # 262,400.
            kth = np.partition(logits, size - s.top_k)[size - s.top_k]
            ids = np.flatnonzero(logits >= kth)
        else:
            ids = np.arange(size)
        ids = ids[logits[ids] > -np.inf]  # rounding could pick a forbidden token, although it weighs nothing
        weights = np.exp((logits[ids].astype(np.float64) - highest) / s.temperature)
        if s.top_p < 1:
            ids, weights = _top_p(ids, weights, s.top_p)
        if s.min_p > 0:
            kept = weights >= s.min_p * weights.max()
            ids, weights = ids[kept], weights[kept]
        return ids, weights


def _top_p(ids: Ids, weights: Floats, top_p: float) -> tuple[Ids, Floats]:
    """Drops the least probable ids that together weigh at most 1 - top_p of all."""
    droppable = (1 - top_p) * weights.sum()
    # Even all together, weights below droppable / n cannot weigh more: they need not be sorted.
    small = weights < droppable / len(weights)
    droppable -= weights[small].sum()
    ids, weights = ids[~small], weights[~small]
    order = np.argsort(weights, kind="stable")
    dropped = int(np.searchsorted(np.cumsum(weights[order]), droppable, side="right"))
    kept = order[min(dropped, len(order) - 1) :]
    return ids[kept], weights[kept]


def _check_highest(highest: float) -> None:
    if not math.isfinite(highest):
        raise GemmaEdgeError(
            f"the model's highest logit is {highest}: its weights or its arithmetic are broken. "
            "Check the bundle's files with `gemma-edge inspect --check`; copy or export a damaged one again."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
