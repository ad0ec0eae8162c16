"""`SlicedCheckpoint`: a checkpoint with narrower FFNs and fewer layers, cut as its rows are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.shards import DTYPE_BITS, Shard, ShardTensor, read_into
from gemma_edge.export.model.export_family import ExportFamily
from gemma_edge.export.model.model_slice import Cut, Slice, overlap
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.files.text_files import read_json

Json = dict[str, Any]


@dataclass(frozen=True)
class CutTensor:
    """A tensor of a slice as a file holds it: key and shape, and what it is of the whole model's tensor."""

    key: str
    shape: tuple[int, ...]
    cut: Cut
    shard: Shard
    whole: ShardTensor

    @property
    def size(self) -> int:
        """Bytes."""
        elements = 1
        for length in self.shape:
            elements *= length
        return elements * DTYPE_BITS[self.whole.dtype] // 8

    def chunks(self, most: int) -> Iterator[NDArray[np.uint8]]:
        """The bytes, in the order of the file, reading about `most` at a time."""
        if self.cut.rows is None and self.cut.columns is None:
            for start in range(self.whole.start, self.whole.stop, most):
                yield self._read(start, min(most, self.whole.stop - start))
            return
        total, *rest = self.whole.shape
        row = (self.whole.stop - self.whole.start) // total
        step, size = max(1, most // row), row // (rest[0] if rest else 1)
        for span in self.cut.rows or (range(total),):
            for start in range(span.start, span.stop, step):
                count = min(step, span.stop - start)
                rows = self._read(self.whole.start + start * row, count * row).reshape(count, row)
                spans = self.cut.columns or (range(row // size),)
                kept = [rows[:, each.start * size : each.stop * size] for each in spans]
                yield np.concatenate(kept, axis=1).reshape(-1)

    def _read(self, offset: int, count: int) -> NDArray[np.uint8]:
        data = np.empty(count, np.uint8)
        read_into(self.shard, data.data, offset, self.whole.key)
        return data


class SlicedCheckpoint(Checkpoint):
    """A slice of another checkpoint, which it closes. `slice` is what is taken of `whole`.

    Args:
        whole: the checkpoint, perhaps with adapters merged.
        wanted: a published slice's name, or widths and layers as text.

    Raises:
        UsageError: the model has no such slice.
    """

    def __init__(self, whole: Checkpoint, wanted: str) -> None:
        self.whole, self.family, self.path, self.towers = whole, whole.family, whole.path, whole.towers
        found = sliced_config(whole.family, whole.path, whole.config, wanted)
        self.slice, self.config_json, self.config = found
        self._cuts: dict[str, tuple[str, Cut]] = {}
        for name in self.family.tensor_specs(whole.config):
            if (cut := self.family.slicing.cut(whole.config, self.slice, name)) is not None:
                self._cuts[cut.name] = name, cut
        self.specs = self.family.tensor_specs(self.config)
        for tower in self.towers.values():
            self.specs |= tower.specs
            self._cuts |= {name: (name, Cut(name)) for name in tower.specs}

    def close(self) -> None:
        self.whole.close()

    def canonical_name(self, stored: str) -> str | None:
        """As of the whole model, whose files these are, where the slice has a part of the tensor."""
        name = self.whole.canonical_name(stored)
        return next((new for new, (origin, _) in self._cuts.items() if origin == name), None)

    def dtype(self, name: str) -> str:
        return self.whole.dtype(self._cuts[name][0])

    def raw_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        total = self.specs[name].shape[0]
        if not 0 <= start <= stop <= total:
            raise IndexError(f"{name}: rows {start}..{stop} of {total}")
        origin, cut = self._cuts[name]
        spans = (range(start, stop),) if cut.rows is None else overlap(cut.rows, start, stop)
        rows = [self.whole.raw_rows(origin, each.start, each.stop) for each in spans or (range(0),)]
        if cut.columns is None:
            return rows[0] if len(rows) == 1 else np.concatenate(rows)
        kept = [part[:, each.start : each.stop] for part in rows for each in cut.columns]
        return np.concatenate(kept, axis=1)  # a tensor is cut in one direction alone

    def check_finite(self, name: str, array: NDArray[np.float32], first_row: int = 0) -> None:
        """As of the whole model, in whose tensor a bad weight is named by its place in the slice."""
        self.whole.check_finite(self._cuts[name][0], array, first_row)

    def changes(self) -> Json:
        """Adds the slice."""
        return {**self.whole.changes(), "slice": self.slice.record()}

    def revision(self) -> str:
        """As of the whole checkpoint, and the slice."""
        return slice_revision(self.whole.revision(), self.slice)

    def cut_tensors(self) -> Iterator[CutTensor]:
        """Every tensor that a file of this slice has, weights that no layer reads and encoders included."""
        for shard, tensor, found in self.whole.stored():
            if found is None:
                yield CutTensor(tensor.key, tensor.shape, Cut(tensor.key), shard, tensor)
                continue
            prefix, name = found
            if (cut := self.family.slicing.cut(self.whole.config, self.slice, name)) is not None:
                yield CutTensor(prefix + cut.name, cut.shape(tensor.shape), cut, shard, tensor)


def sliced_config(
    family: ExportFamily, folder: Path, config: TextConfig, wanted: str
) -> tuple[Slice, Json, TextConfig]:
    """A slice of the model of a folder: what is taken, its config.json, and that parsed; reads no weight.

    Raises:
        UsageError: the model has no such slice.
    """
    path = folder / "config.json"
    chosen = family.slicing.resolve(config, wanted)
    data = family.slicing.config_json(read_json(path, ConfigError), config, chosen)
    return chosen, data, family.runtime.text_config(data, path)


def slice_revision(whole: str, taken: Slice) -> str:
    """The fingerprint of a slice of a checkpoint with the fingerprint `whole`."""
    record = json.dumps([taken.widths, taken.skipped])
    return hashlib.sha256(f"{whole}\0{record}".encode()).hexdigest()
