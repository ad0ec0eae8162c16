"""A tensor of a model: its canonical name, shape and part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What a recipe can give a precision of its own."""

    DECODER = "decoder"  # attention and feed-forward projections
    HEAD = "head"  # output head; tied, its rows are also the token embeddings
    EMBEDDING = "embedding"  # token embeddings of an untied model: mapped, not resident
    PLE = "ple"  # per-layer embedding table: mapped, one row a token
    SMALL = "small"  # AltUp, Laurel and per-layer-input projections
    VECTOR = "vector"  # norms, biases, scales and AltUp coefficients: always fp32


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: canonical name, shape as PyTorch stores it (out, in), and part."""

    name: str
    shape: tuple[int, ...]
    part: Part

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in a checkpoint: the same elements."""
        return self.shape

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)
