"""`SnapshotPool`: KV snapshots of earlier prompts in memory, within a budget, the least recently used out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from gemma_edge.runtime.engines.kv_snapshot import KvSnapshot
from gemma_edge.runtime.host.available_memory import available_memory
from gemma_edge.runtime.reuse.kv_file import Keys

SNAPSHOTS = 128 << 20  # bytes, unless told: three conversations of 1,000 tokens with E2B in int4
SPARE_BYTES = 64 << 20  # stay free beside a snapshot
LEAST_TOKENS = 64  # that a cache must spare to be taken back to them


def common_prefix(first: Keys, second: Keys) -> int:
    """How many keys two lists start with together."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # slices are compared much faster than Python compares items
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def reusable(held: Keys, earliest: int, keys: Keys) -> int:
    """How many of a prompt's first tokens a cache of `held` spares: all that are held, or those that it can
    be taken back to. A few are not worth it: in other calls the rest is rounded differently.
    """
    shared = common_prefix(held, keys)
    return shared if shared == len(held) or shared >= max(earliest, LEAST_TOKENS) else 0


@dataclass
class Kept:
    """A snapshot, the keys of its tokens, and when it was last used.

    `passing` ones are of a prompt or an answer that may go on: they give way to one that went on. `pinned`
    ones are of an answer that will go on: they stay.
    """

    keys: Keys
    snapshot: KvSnapshot
    passing: bool
    used: int
    pinned: bool = False


class SnapshotPool:
    """See the module.

    Args:
        budget: bytes that the snapshots take at most; 0 keeps none.
    """

    def __init__(self, budget: int = 0) -> None:
        self.budget = budget
        self._kept: list[Kept] = []
        self._clock = count()

    @property
    def bytes(self) -> int:
        return sum(kept.snapshot.bytes for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, keys: Keys) -> tuple[int, Kept | None]:
        """The snapshot that spares most of a prompt, and how many tokens."""
        found = [(reusable(kept.keys, kept.snapshot.earliest, keys), kept) for kept in self._kept]
        tokens, best = max(found, key=lambda pair: (pair[0], pair[1].used), default=(0, None))
        return (tokens, best) if tokens else (0, None)

    def longest(self, keys: Keys) -> tuple[Keys, KvSnapshot] | None:
        """The longest snapshot that begins with `keys`, and its keys."""
        found = [kept for kept in self._kept if kept.keys[: len(keys)] == keys]
        best = max(found, key=lambda kept: len(kept.keys), default=None)
        return (best.keys, best.snapshot) if best else None

    def branch(self, keys: Keys) -> int:
        """The most keys that a prompt shares with any snapshot, whether or not that is of use."""
        return max((common_prefix(kept.keys, keys) for kept in self._kept), default=0)

    def touch(self, kept: Kept) -> None:
        """Says that a snapshot was used now."""
        kept.used = next(self._clock)

    def covers(self, keys: Keys) -> bool:
        """Whether a snapshot of these keys is there, or a longer one that can be taken back to them."""
        size = len(keys)
        return any(kept.keys[:size] == keys and kept.snapshot.earliest <= size for kept in self._kept)

    def make_room(self, size: int) -> bool:
        """Whether a snapshot of `size` bytes fits the budget and free memory, once others went for it."""
        if sum(kept.snapshot.bytes for kept in self._kept if kept.pinned) + size > self.budget:
            return False
        loose = sorted((kept for kept in self._kept if not kept.pinned), key=lambda kept: -kept.used)
        while loose and (self.bytes + size > self.budget or _short_of(size)):
            self._kept.remove(loose.pop())
        return not _short_of(size)

    def add(self, keys: Keys, snapshot: KvSnapshot, *, passing: bool, pinned: bool = False) -> Kept:
        """Keeps a snapshot for which `make_room` has made room."""
        self._kept = [
            kept
            for kept in self._kept
            if kept.pinned
            or (kept.keys != keys and not (kept.passing and kept.keys == keys[: len(kept.keys)]))
        ]
        self._kept.append(Kept(keys, snapshot, passing, next(self._clock), pinned))
        return self._kept[-1]

    def clear(self) -> None:
        """Forgets all of them."""
        self._kept.clear()


def _short_of(size: int) -> bool:
    free = available_memory()
    return free is not None and free < size + SPARE_BYTES
