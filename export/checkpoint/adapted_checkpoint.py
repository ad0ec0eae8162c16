"""`AdaptedCheckpoint`: a checkpoint with adapters merged into its weights, row by row as they are read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.adapter import OTHER_BASE, Adapter, Change
from gemma_edge.export.checkpoint.checkpoint import Checkpoint, public_name, resolve
from gemma_edge.export.model.tensor_spec import HEAD_NAME
from gemma_edge.runtime.artifacts.modalities import KINDS, Kind
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.hub.hub_address import HUB_ID

TIED = "Its head is tied to the token embeddings: train it without both."
EMBEDDINGS = "embed_tokens.weight"


def open_adapted(
    source: str | Path, adapters: Sequence[str], encoders: Collection[Kind] = KINDS
) -> Checkpoint:
    """A checkpoint with adapters merged; arguments and errors are those of `open_source`."""
    checkpoint = AdaptedCheckpoint.open(resolve(str(source)), encoders)
    assert isinstance(checkpoint, AdaptedCheckpoint)
    try:
        for text in adapters:
            checkpoint.add(text, str(source))
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


class AdaptedCheckpoint(Checkpoint):
    """See `open_adapted`. `applied` are the adapters, by their names as given."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.applied: list[tuple[str, Adapter]] = []
        self._edits: dict[str, list[tuple[Adapter, Change]]] = {}

    def add(self, text: str, source: str) -> None:
        """Merges one more adapter. Raises as `open_source` does."""
        name, weight = _named(text)
        adapter = Adapter(resolve(name, adapter=True), weight)
        self.applied.append((name, adapter))
        base = adapter.config.base
        on_hub = HUB_ID.fullmatch(base) and HUB_ID.fullmatch(source) and not Path(source).exists()
        if on_hub and base != source:
            raise UsageError(f"{name} is an adapter of {base}, not of {source}: gemma-edge export {base} ...")
        changed = 0
        for stored, change in adapter.changes.items():
            changed += self._add_change(adapter, stored, change)
        if not changed:
            raise adapter.refuse("file", "a change of this model", "none", OTHER_BASE)

    def _add_change(self, adapter: Adapter, stored: str, change: Change) -> bool:
        """Whether a tensor of this model changes; encoders that are left out and unused weights do not."""
        tied = self.config.tie_word_embeddings
        if tied and stored.endswith(HEAD_NAME):
            raise adapter.refuse(change.a, "a head that the model has", "none", TIED)
        if (name := self.canonical_name(stored)) is None:
            return False
        if (spec := self.specs.get(name)) is None:
            raise adapter.refuse(change.a, "a tensor of the model", "no such tensor", OTHER_BASE)
        if tied and name == EMBEDDINGS:
            raise adapter.refuse(change.a, "embeddings apart from the head", "one tensor for both", TIED)
        adapter.check(change, spec)
        before = self._edits.setdefault(name, [])
        alone = change.kind == "whole" or change.magnitude
        if before and (alone or before[0][1].kind == "whole" or before[0][1].magnitude):
            raise adapter.refuse(change.a, "one adapter", "two that do not add up", "Merge one of them.")
        before.append((adapter, change))
        return True

    def close(self) -> None:
        super().close()
        for _, adapter in self.applied:
            adapter.close()

    def dtype(self, name: str) -> str:
        return "F32" if name in self._edits else super().dtype(name)

    def raw_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        raw = super().raw_rows(name, start, stop)
        for adapter, change in self._edits.get(name, ()):
            raw = adapter.apply(change, raw.astype(np.float32, copy=False), start)
        return raw

    def revision(self) -> str:
        """As of the checkpoint alone, and the adapters' digests."""
        digest = hashlib.sha256(super().revision().encode())
        for _, adapter in self.applied:
            digest.update(adapter.digest().encode())
        return digest.hexdigest()

    def changes(self) -> dict[str, Any]:
        """Adds the adapters, in the order in which they were merged."""
        records = [
            {"name": public_name(name), "weight": adapter.weight, "sha256": adapter.digest()}
            for name, adapter in self.applied
        ]
        return {**super().changes(), "adapters": records}


def _named(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    if not name or Path(text).is_dir():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"--adapter {text}: expected a folder, or FOLDER=WEIGHT such as lora/=0.5")
    return name, weight
