"""A tensor of a model: its canonical name, shape and part; the names that all families share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from gemma_edge.runtime.families.model_family import TextConfig

EMBEDDING_NAME = "embed_tokens.weight"
HEAD_NAME = "lm_head.weight"
PLE_NAME = "embed_tokens_per_layer.weight"


def head_name(config: TextConfig) -> str:
    """The tensor that the output head multiplies with."""
    return EMBEDDING_NAME if config.tie_word_embeddings else HEAD_NAME


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
