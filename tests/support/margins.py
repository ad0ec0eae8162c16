"""Tokens judged by margins: where two logits nearly tie, the rounding of a CPU's kernels chooses.

Greedy tokens are a sound judge only where the best logit leads the second by more than twice the error of
a logit: there every CPU and every engine chooses the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.model import Model

Array = NDArray[np.float32]

# How far a logit of an fp32 bundle may be from the reference's: kernels add up in another order.
FP32 = 1e-3


def int8_activations(logits: Array) -> float:
    """How far two kernels' logits may be apart where activations are rounded to 8 bits.

    Rounding moves an activation by up to 1/254 of the largest of its row: about 0.8 % of the products of
    normally distributed rows. Sums whose last bits differ round some activations to the other neighbour, and
    from there on the two computations round independently: over some 36 products in a row,
    0.8 % * sqrt(2 * 36) is 7 % of the logits' deviation, and the worst of thousands is further off than most.
    Measured on the tiny model and Pocket with AVX2, AVX-512, VNNI and AMX kernels: at most 9 %.
    """
    return 0.15 * float(logits.std())


def leads(logits: Array) -> Array:
    """Of logits (steps, vocab): how far the best of each step is above the second, (steps,)."""
    second, best = np.partition(logits, -2, axis=1)[:, -2:].T
    return best - second


def assert_decided(logits: Array, error: float) -> None:
    """Every step's best logit is best on every CPU: tokens may be compared one by one."""
    assert leads(logits).min() > 2 * error, "a near tie: other weights or another prompt are needed"


def assert_allowed(tokens: Sequence[int], logits: Array, error: float, *, decided: float) -> None:
    """Greedy tokens of another engine, or of other calls, are the best by `logits`, or as good as the best.

    Args:
        logits: (tokens, vocab), of `tokens` themselves as the context of each step.
        error: how far a logit of the other may be from these.
        decided: the least share of steps that leave no choice; without one, any tokens would pass.
    """
    assert len(tokens) == len(logits)
    behind = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
    assert behind.max() <= 2 * error
    assert (leads(logits) > 2 * error).mean() >= decided


def step_logits(model: Model, prompt: Sequence[int], tokens: Sequence[int]) -> Array:
    """The logits (tokens, vocab) that each of `tokens` was chosen by, if the model answered with them."""
    model.reset()
    context, rows = np.array([*prompt, *tokens[:-1]]), []
    starts = [*range(0, len(prompt), model.decoder.chunk), *range(len(prompt), len(context))]
    for ids in np.split(context, starts[1:]):
        rows.append(model.decoder.forward(model.embeddings.lookup(ids), model.per_layer.lookup(ids), 1)[-1])
    return np.stack(rows[-len(tokens) :])


@contextmanager
def recorded(model: Model) -> Iterator[list[Array]]:
    """Collects the last row of every call of the decoder that computes logits, (vocab,) each."""
    seen: list[Array] = []
    forward = model.decoder.forward

    def spy(embeddings: Array, per_layer: Array, n_logits: int = 1) -> Array:
        logits = forward(embeddings, per_layer, n_logits)
        seen.extend(logits[-1:].copy())
        return logits

    model.decoder.forward = spy  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        model.decoder.forward = forward  # type: ignore[method-assign]
