"""What the rounding of each part of a bundle costs: the divergence with that part alone rounded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.open_source import open_source
from gemma_edge.export.gate.graph_check import stored_source
from gemma_edge.export.gate.parity import compared_sequences
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.tensor_spec import PLE_NAME
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.export.precision_budget import CHOSEN_PARTS, KINDS, divergences, unit_of
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.model_parts import bundle_tables

Array = NDArray[np.float32]
TABLE = "per-layer embeddings"


def part_costs(
    bundle: str | Path,
    source: str | Path,
    *,
    text: str | None = None,
    max_tokens: int = 256,
    adapters: Sequence[str] = (),
    slice: str | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Mean divergence from the checkpoint, in nats a token, when only one part is as the bundle stores it.

    The reference computes it in fp32, so it is what stored weights cost, without an engine's own rounding.
    The bundle should be known to be of this checkpoint, see `verify_bundle`, whose arguments these are.

    Returns:
        By kind of weights, the costliest first.
    """
    opened = Bundle.open(bundle)
    sequences = compared_sequences(opened, text, max_tokens)
    stored = stored_source(opened)
    _, per_layer = bundle_tables(opened)
    names: dict[str, set[str]] = {}
    for tensor in stored.tensors:
        if tensor.part in CHOSEN_PARTS and stored.bits[tensor.name] < 32:
            rounded = {weight.name for weight in tensor.weights if isinstance(weight, Weight)}
            names.setdefault(unit_of(tensor).kind, set()).update(rounded)
    scale = np.float32(opened.config.ple_scale)
    with open_source(source, adapters, [], slice) as checkpoint:
        others: dict[str, WeightSource] = {
            kind: _Mixed(checkpoint, stored.rows, stored.read, names[kind]) for kind in KINDS if kind in names
        }

        def table(name: str, start: int, stop: int) -> Array:
            return np.asarray(per_layer.lookup(np.arange(start, stop)), np.float32) / scale

        others[TABLE] = _Mixed(checkpoint, table, checkpoint.read, {PLE_NAME})
        with ProgressBar("measuring parts", 0, progress):
            found = divergences(checkpoint, others, sequences)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


class _Mixed:
    """The checkpoint's weights, but for some names."""

    def __init__(
        self,
        checkpoint: WeightSource,
        rows: Callable[[str, int, int], Array],
        read: Callable[[str], Array],
        names: Collection[str],
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self._rows, self._read, self._names = rows, read, names

    def read(self, name: str) -> Array:
        return self._read(name) if name in self._names else self.checkpoint.read(name)

    def rows(self, name: str, start: int, stop: int) -> Array:
        if name in self._names:
            return self._rows(name, start, stop)
        return self.checkpoint.rows(name, start, stop)
