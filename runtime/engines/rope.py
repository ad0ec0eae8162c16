"""Rotary position tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig


def rotary_tables(
    config: Gemma3nConfig, layer_type: str, positions: int | NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, each f32 (positions, head_dim / 2), of a layer type.

    Angles are formed in fp32 as position * frequency, as transformers does: in fp64 they would differ from it
    by 1e-3 rad at position 30,000.
    """
    if isinstance(positions, int):
        positions = np.arange(positions)
    frequencies = np.array(config.inverse_frequencies(layer_type), dtype=np.float32)
    angles = positions[:, None].astype(np.float32) * frequencies
    return np.cos(angles), np.sin(angles)
