"""`ObservedDecoder`: a bundle's own decoder, which also tells what goes on inside a call.

It runs the artifact's graph, with further outputs and nothing else changed, in the runtime's own decoder: the
caches, masks and rotary tables are those of an answer. The further outputs are what every product with a
weight takes and gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.engines.kv_snapshot import KvBuffers

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Product:
    """One product with a stored weight: x (rows, in) and y (rows, out), both fp32."""

    x: Array
    y: Array


@dataclass(frozen=True)
class Observation:
    """One call.

    Attributes:
        products: by the name of the stored weight, in the order of the graph.
        keys, values: of the call's own tokens, by layer that owns KV: (tokens, KV heads, head_dim) as the
            cache holds them, int8 or fp32.
        logits: (wanted, vocab); (0, vocab) of a call that computes none.
        complete: the graph has every layer; otherwise none beyond the last that owns KV.
    """

    products: dict[str, list[Product]]
    keys: dict[int, NDArray[np.generic]]
    values: dict[int, NDArray[np.generic]]
    logits: Array
    complete: bool = True


@dataclass(frozen=True)
class Call:
    """A call to observe: `tokens` of them behind a cache of `position`, with the last `wanted` logits."""

    position: int
    tokens: int
    wanted: int


@dataclass(frozen=True)
class KvSteps:
    """Of an int8 cache: what a cached integer is multiplied with, (KV heads, head_dim) each."""

    key: Array
    value: Array


class ObservedDecoder(Decoder, Protocol):
    """See the module.

    Attributes:
        buffers: the KV cache.
        to_observe: calls that go through every part of the graph.
        steps: of the layers whose cache is int8.
    """

    buffers: KvBuffers
    to_observe: Sequence[Call]
    steps: dict[int, KvSteps]

    def observe(self, embeddings: Array, per_layer: Array, wanted: int) -> Observation:
        """`forward`, observed."""


def rows_of(array: NDArray[np.generic]) -> Array:
    """(..., width) as (rows, width), a copy."""
    return np.array(array, np.float32).reshape(-1, array.shape[-1])
