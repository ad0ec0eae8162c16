"""Weights that are off by as much as rounding to 4 bits puts them off: what is learned with them outlasts it.

The noise follows no one method's grid, so methods of quantization remain comparable on what was learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

GROUPS = (32, 64, 128)  # weights that share a scale, of which one is drawn
STEPS = 7  # of a scale between 0 and the largest weight of a group
PARTS = (".self_attn.", ".mlp.", ".embed_tokens")  # of the names of what recipes of 4 bits round to 4


def rounded(named: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The matrices that recipes of 4 bits round to 4."""
    return [weight for name, weight in named if weight.dim() == 2 and any(part in name for part in PARTS)]


def noise(weight: Tensor, group: int) -> Tensor:
    """(rows, columns): uniform within half a step of its group's scale."""
    columns = weight.shape[1]
    group = math.gcd(group, columns)
    scale = weight.view(len(weight), -1, group).abs().amax(-1, keepdim=True) / STEPS
    draws = torch.rand(len(weight), columns // group, group) - 0.5
    return (draws * scale).view_as(weight)


@contextmanager
def noisy(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, `weights` carry noise; what gradients are taken there belong to them as they were."""
    group = GROUPS[int(torch.randint(len(GROUPS), ()))]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.add_(noise(weight, group))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
