"""The protocol through which interpreters and writers read weights."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.model.ops import Weight
from gemma_edge.runtime.families.model_family import TextConfig

Array = NDArray[np.float32]


class WeightSource(Protocol):
    """Where weights come from: a checkpoint, or a dictionary in a test."""

    config: TextConfig

    def read(self, name: str) -> Array: ...
    def rows(self, name: str, start: int, stop: int) -> Array: ...


def read_weight(source: WeightSource, weight: Weight) -> Array:
    """What a reference stands for, fp32."""
    array = source.rows(weight.name, *weight.rows) if weight.rows else source.read(weight.name)
    return array if weight.factor == 1.0 else array * np.float32(weight.factor)
