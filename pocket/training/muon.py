"""Muon in fp32, and AdamW beside it.

Torch's own Muon computes in bf16, ten times as slow on a CPU without bf16 units.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM, WEIGHT_DECAY, CLIP = 0.95, 0.01, 1.0
# The quintic of Keller Jordan's Muon: singular values end between 0.7 and 1.2 after five steps.
A, B, C, STEPS = 3.4445, -4.7750, 2.0315, 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """(n, rows, columns): each with its singular values near 1, by Newton-Schulz."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(STEPS):
        square = x @ x.transpose(1, 2)
        x = A * x + (B * square + C * square @ square) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices, and convolutions as matrices.

    A step has the size of AdamW's, 0.2 a weight, so that both take one learning rate.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Moves every matrix that has a gradient; those of one shape at once."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.flatten(1).shape].append(weight)
            for shape, weights in alike.items():
                updates = []
                for weight in weights:
                    state = self.state[weight]
                    if not state:
                        state["momentum"] = torch.zeros_like(weight)
                    state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                    updates.append(weight.grad.lerp(state["momentum"], MOMENTUM).flatten(1))
                size = 0.2 * math.sqrt(max(shape))
                for weight, update in zip(weights, orthogonalized(torch.stack(updates)), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update.view_as(weight), alpha=-group["lr"] * size)


class Optimizers:
    """Muon for linear layers and convolutions, AdamW for everything else, one schedule."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], rate: float) -> None:
        self.rate = rate
        matrices, others = [], []
        for name, weight in named:
            table = "embed_tokens" in name or name.endswith("embedding.weight")
            mixes = weight.dim() > 1 and min(weight.shape[:2]) > 4  # no vector, no depthwise convolution
            (matrices if mixes and not table else others).append(weight)
        self.parameters = [*matrices, *others]
        self.both: list[torch.optim.Optimizer] = [
            Muon(matrices, rate, WEIGHT_DECAY),
            torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
        ]

    def step(self, factor: float) -> None:
        """One step down the gradients that there are, with `factor` times the learning rate."""
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        for optimizer in self.both:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * factor
            optimizer.step()
            optimizer.zero_grad()
