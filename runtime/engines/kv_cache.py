"""The layout of the KV cache: which layers have keys and values, and for how many positions.

A sliding layer only ever reads its window, so its cache is window-sized and the attention operator evicts;
the operator cannot share a windowed cache, so the sliding layer that others read keeps every position, as
the global layers do. For E2B at a context of 4096 that is 5 full and 15 windowed caches: 112 MiB instead of
320, and 52 with the full ones in int8.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

BYTES = {"fp32": 4, "int8": 1}
SLACK = 32  # places beyond a window that is not small


@dataclass(frozen=True)
class CacheLayout:
    """The cache of one layer that owns KV."""

    windowed: bool
    window_capacity: int
    precision: str  # "fp32" or "int8"
    row_bytes: int  # one position: keys and values of all KV heads

    def capacity(self, context: int) -> int:
        """Positions that the buffers of this layer hold; the operator refuses less than a window."""
        return self.window_capacity if self.windowed else context

    def bytes(self, context: int) -> int:
        return self.capacity(context) * self.row_bytes


def cache_layouts(config: Gemma3nConfig, precision: str = "fp32") -> dict[int, CacheLayout]:
    """The layout of every layer that owns KV.

    Args:
        precision: of the caches that grow with the context. Windowed ones are small and stay fp32: attention
            of a prefill takes 3.5 times as long over an int8 cache (ONNX Runtime 1.31, x86-64, 256 tokens).
    """
    shared = {config.kv_owner[i] for i in range(config.first_shared_layer, config.num_hidden_layers)}
    # Evicting moves the window once every (capacity - window + 1) tokens, which this slack makes rare enough;
    # drafts are taken back within it.
    window = config.sliding_window
    capacity = window + max(1, min(SLACK, window // 2), window // 16)
    layouts = {}
    for layer in config.kv_layers:
        windowed = config.is_sliding(layer) and layer not in shared
        kept = "fp32" if windowed else precision
        layouts[layer] = CacheLayout(windowed, capacity, kept, 2 * config.key_value_size * BYTES[kept])
    return layouts


def window_capacity(config: Gemma3nConfig, context: int) -> int:
    """Positions in the ring of a sliding layer, where the engine lets us choose: what it can see."""
    return min(config.sliding_window, context)


def int8_layers(config: Gemma3nConfig, precision: str, *, rings: bool) -> frozenset[int]:
    """Layers whose cache a .tflite has in int8, if that is the `precision`: those that grow with the context.

    Args:
        rings: sliding layers have rings; otherwise all caches are as long as the context.
    """
    if precision != "int8":
        return frozenset()
    return frozenset(i for i in config.kv_layers if not (rings and config.is_sliding(i)))


def litert_cache_bytes(config: Gemma3nConfig, context: int, precision: str, *, rings: bool) -> int:
    """Bytes of the caches of a .tflite, and of the fp32 copy of an int8 one that attention reads.

    Args:
        rings: as in `int8_layers`.
    """
    row, ring = 2 * config.key_value_size, window_capacity(config, context)
    int8 = int8_layers(config, precision, rings=rings)
    copy = context * row * BYTES["fp32"] if int8 else 0
    return copy + sum(
        (ring if rings and config.is_sliding(i) else context) * row * BYTES["int8" if i in int8 else "fp32"]
        for i in config.kv_layers
    )


def values_transposed(config: Gemma3nConfig, layer: int, context: int, rings: bool) -> bool:
    """Whether a .tflite caches a layer's values as (head_dim, positions), not (positions, head_dim).

    Attention over all positions is faster so. A sliding layer has its window's rows together: in a ring, or
    picked from a whole cache.

    Args:
        rings: sliding layers have rings; otherwise all caches are `context` long.
    """
    if context == config.head_dim:  # shapes would not tell
        return not rings
    return not config.is_sliding(layer) or not (rings or context > config.sliding_window)
