"""`KvSnapshot`: the used part of a KV cache, copied out of a decoder; `KvBuffers` copies it out and in.

A buffer keeps all positions, or the latest ones only. Which ones, and at which places, depends on the
position alone and not on the calls that led there. So the first `used` places of every buffer are all that a
decoder of the same layout needs to go on, bit for bit, with any context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import UsageError

Array = NDArray[Any]


class Kept(Protocol):
    """The positions that a buffer keeps when `position` tokens are in the cache."""

    def used(self, position: int) -> int:
        """How many of its places, from the first on, hold something."""

    def earliest_at(self, position: int) -> int:
        """The least position that the cache can be taken back to: what it needs there is still in place."""

    def positions(self, position: int) -> NDArray[np.int64]:
        """The positions of the tokens at the used places."""


@dataclass(frozen=True)
class EveryPosition:
    """A buffer as long as the context."""

    def used(self, position: int) -> int:
        return position

    def earliest_at(self, position: int) -> int:
        return 0

    def positions(self, position: int) -> NDArray[np.int64]:
        return np.arange(position)


@dataclass(frozen=True)
class Ring:
    """The latest `length` positions, `length` being the window: position p at place p % length."""

    length: int

    def used(self, position: int) -> int:
        return min(position, self.length)

    def earliest_at(self, position: int) -> int:
        # A token overwrites the one that it is the first not to see.
        return 0 if position <= self.length else position - 1

    def positions(self, position: int) -> NDArray[np.int64]:
        places = np.arange(self.used(position))
        return position - 1 - (position - 1 - places) % self.length


@dataclass(frozen=True)
class Evicting:
    """As `GroupQueryAttention` keeps a window: a full buffer moves down, by all that its window can spare."""

    capacity: int
    window: int

    def _first(self, position: int) -> int:
        """The position at the first place."""
        step = self.capacity - self.window + 1
        return -(-max(0, position - self.capacity) // step) * step

    def used(self, position: int) -> int:
        return position - self._first(position)

    def earliest_at(self, position: int) -> int:
        first = self._first(position)
        return first + self.window if first else 0

    def positions(self, position: int) -> NDArray[np.int64]:
        return np.arange(self._first(position), position)


@dataclass(frozen=True)
class KvSnapshot:
    """The used part of a KV cache.

    Attributes:
        layout: `KvBuffers.layout` of the decoder that it is of.
        position: tokens in it.
        earliest: the least position that it can be taken back to once it is restored.
        arrays: by the names of the buffers, each (1, KV heads, places, head_dim), or with the last two axes
            changed where the engine has them so; fp32 or int8.
    """

    layout: str
    position: int
    earliest: int
    arrays: Mapping[str, Array]

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class _Buffer:
    array: Array
    kept: Kept
    axis: int  # of the places

    def places(self, position: int) -> Array:
        """The used places, as a view."""
        return self.array[(slice(None),) * self.axis + (slice(self.kept.used(position)),)]

    def shape(self, position: int) -> tuple[int, ...]:
        used = self.kept.used(position)
        return (*self.array.shape[: self.axis], used, *self.array.shape[self.axis + 1 :])

    def __str__(self) -> str:
        return f"{self.kept} {self.array.dtype} {self.shape(0)}"  # not the length of `EveryPosition`


class ForeignSnapshotError(UsageError):
    """A KV snapshot has the layout of another model, engine, or version of the engine."""


class KvBuffers:
    """The KV buffers of one decoder, as arrays that the engine reads and writes.

    Args:
        engine: the engine and its version: another one may lay the same buffers out differently.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self._buffers: dict[str, _Buffer] = {}

    def add(self, name: str, array: Array, kept: Kept, axis: int = 2) -> None:
        """Adds a buffer whose places are along `axis`."""
        self._buffers[name] = _Buffer(array, kept, axis)

    @property
    def layout(self) -> str:
        """Equal for decoders that take each other's snapshots; it does not depend on the context."""
        lines = [self.engine, *(f"{name} {buffer}" for name, buffer in sorted(self._buffers.items()))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    def earliest_at(self, position: int) -> int:
        """The least position that all buffers can be taken back to."""
        return max((buffer.kept.earliest_at(position) for buffer in self._buffers.values()), default=0)

    def bytes(self, position: int) -> int:
        """What a snapshot at a position takes."""
        sizes = (buffer.shape(position) for buffer in self._buffers.values())
        items = (buffer.array.itemsize for buffer in self._buffers.values())
        return sum(int(np.prod(shape)) * item for shape, item in zip(sizes, items, strict=True))

    def positions(self, name: str, position: int) -> NDArray[np.int64]:
        """The positions of the tokens at the used places of a buffer."""
        return self._buffers[name].kept.positions(position)

    def by_place(self, name: str, array: Array) -> Array:
        """A snapshot's array of a buffer as a view (places, KV heads, head_dim)."""
        return np.moveaxis(array[0], self._buffers[name].axis - 1, 0)

    def snapshot(self, position: int) -> KvSnapshot:
        """A copy of the places that are used at a position."""
        arrays = {name: buffer.places(position).copy() for name, buffer in self._buffers.items()}
        return KvSnapshot(self.layout, position, self.earliest_at(position), arrays)

    def restore(self, snapshot: KvSnapshot) -> None:
        """Writes a snapshot back.

        Raises:
            ForeignSnapshotError: it is of another layout; nothing is written then.
            UsageError: it is not what its layout says; nothing is written then.
        """
        if snapshot.layout != self.layout:
            raise ForeignSnapshotError("the KV snapshot is of another model or engine")
        if problem := next(self._misfits(snapshot), None):
            raise UsageError(f"the KV snapshot is damaged: {problem}")
        for name, buffer in self._buffers.items():
            buffer.places(snapshot.position)[...] = snapshot.arrays[name]

    def _misfits(self, snapshot: KvSnapshot) -> Iterator[str]:
        if missing := sorted(self._buffers.keys() ^ snapshot.arrays.keys()):
            yield f"buffer {missing[0]}"
        for name, buffer in self._buffers.items():
            array, shape = snapshot.arrays[name], buffer.shape(snapshot.position)
            if array.shape != shape or array.dtype != buffer.array.dtype:
                yield f"{name} is {array.dtype} {array.shape}, not {buffer.array.dtype} {shape}"
