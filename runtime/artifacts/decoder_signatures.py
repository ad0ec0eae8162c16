"""`DecoderSignatures`: what a decoder's .tflite can be called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderSignatures:
    """See the module.

    Attributes:
        prefill, verify: tokens of each signature of that name, ascending.
        context: positions of the longest KV cache.
        lengths: positions of each KV cache, by layer.
        layout: "litertlm" or "windowed".
        transposed: layers whose values are cached as (head_dim, positions).
        int8: layers whose cache is int8; that of others is fp32.
    """

    prefill: tuple[int, ...]
    context: int
    lengths: Mapping[int, int]
    layout: str
    transposed: frozenset[int]
    verify: tuple[int, ...] = ()
    int8: frozenset[int] = frozenset()
