"""`PromptCache`: KV caches of earlier prompts, and which of them spares a new prompt most.

That may be the decoder's own, one of the snapshots in memory, or a file. Prompts are compared by their keys,
so conversations are told apart by what they say: any number of them share one decoder, and one that comes
back is restored instead of computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.engines.kv_snapshot import KvSnapshot
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.prompt.prompt_builder import Prompt
from gemma_edge.runtime.reuse.kv_file import Keys
from gemma_edge.runtime.reuse.prefix_files import PrefixFiles
from gemma_edge.runtime.reuse.snapshot_pool import (
    LEAST_TOKENS,
    Kept,
    SnapshotPool,
    common_prefix,
    reusable,
)

ASIDE_TOKENS = 8  # of a conversation that another one interrupts: fewer are computed again
Place = Literal["memory", "disk"]


@dataclass(frozen=True)
class Start:
    """Where a prompt begins: after its first `tokens`, which are restored from a snapshot, or in the decoder.

    `branch` is where it leaves what is known, whether or not a cache of that point can be had.
    """

    tokens: int
    branch: int = 0
    snapshot: KvSnapshot | None = None
    place: Place | None = None


class PromptCache:
    """See the module. Not thread-safe.

    Args:
        decoder: whose KV cache nobody else feeds; if somebody does, nothing of it is reused.
        pool: snapshots in memory.
        files: snapshots on disk; None for none.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: SnapshotPool | None = None,
        files: PrefixFiles | None = None,
    ) -> None:
        self.decoder, self.files = decoder, files
        self.pool = SnapshotPool() if pool is None else pool  # an empty one is false
        self._held: Keys | None = None  # of the decoder's tokens; None: not known, as after an error

    @property
    def held(self) -> Keys:
        """The keys of the tokens in the decoder's KV cache; none if that is not known."""
        known = self._held
        return known if known is not None and len(known) == self.decoder.position else []

    def find(self, keys: Keys) -> Start:
        """Where tokens with these keys can begin with the least to compute."""
        held = self.held
        branch = max(common_prefix(held, keys), self.pool.branch(keys))
        best = Start(reusable(held, self.decoder.earliest_at(len(held)), keys), branch)
        tokens, kept = self.pool.find(keys)
        if kept and tokens >= best.tokens + ASIDE_TOKENS:
            self.pool.touch(kept)
            best = Start(tokens, branch, kept.snapshot, "memory")
        if self.files and len(keys) >= best.tokens + self.files.least:
            best = replace(best, branch=max(branch, self.files.branch(keys)))
            tokens, snapshot = self.files.find(keys, beyond=best.tokens)
            if snapshot:
                best = replace(best, tokens=tokens, snapshot=snapshot, place="disk")
        return best

    def begin(self, start: Start, keys: Keys) -> bool:
        """Makes the first `start.tokens` of a prompt what the decoder's cache holds, and keeps aside what it
        held; False if the decoder does not take the snapshot: `find` another start then.
        """
        held = self.held
        if start.snapshot or start.tokens < len(held):
            if len(held) - common_prefix(held, keys) >= ASIDE_TOKENS:
                self._keep_aside(held)
            self._held = None  # until it is known again
        try:
            if start.snapshot:
                self.decoder.restore(start.snapshot)
            if start.tokens:
                self.decoder.truncate(start.tokens)
            else:
                self.decoder.reset()
        except UsageError:
            if start.place != "disk" or self.files is None:
                raise
            self.files.forget(keys[: start.tokens])
            return False
        self._held = keys[: start.tokens]
        return True

    def cuts(self, prompt: Prompt, start: Start) -> list[int]:
        """The positions of a prompt, after its start, at which `keep` is to be called, in order.

        They are where the next prompt may differ: where this one left what is known, its boundaries, its end.
        One that a later one can be taken back to is left out, and one that spares too little.
        """
        if not self.pool.budget and not self.files:
            return []
        keys = prompt.keys
        wanted = {position for position in (start.branch, *prompt.boundaries) if position < len(keys)}
        reached: list[int] = []
        for position in sorted({*wanted, len(keys)}, reverse=True):
            if not reached or self.decoder.earliest_at(reached[-1]) > position:
                reached.append(position)
        cuts, last = [], start.tokens
        for position in reversed(reached):
            if position >= last + LEAST_TOKENS:
                cuts.append(position)
                last = position
        return cuts

    def keep(self, whole: bool) -> None:
        """Keeps a snapshot of the decoder's cache as it is.

        Args:
            whole: a prompt ends here.
        """
        held = self.held
        fits = not self.pool.covers(held) and self._room()
        wanted = self.files is not None and self.files.wants(held)
        if not held or not (fits or wanted):
            return
        snapshot = self.decoder.snapshot()
        if fits:
            self.pool.add(list(held), snapshot, passing=whole)
        if self.files and wanted:
            self.files.store(held, snapshot)

    def feeding(self) -> Keys:
        """The keys held, which are unknown until `fed` says what came of it."""
        held, self._held = self.held, None
        return held or []

    def fed(self, held: Keys) -> None:
        """Says what the decoder's cache holds."""
        self._held = held

    def take_back(self, position: int) -> None:
        """Takes the decoder's cache back to a position, and forgets the keys of the tokens behind it."""
        held = self.feeding()
        self.decoder.truncate(position)
        del held[position:]
        self.fed(held)

    def adopt(self, keys: Keys, snapshot: KvSnapshot) -> None:
        """Puts somebody's snapshot into the decoder; what it held is kept aside.

        Raises:
            UsageError: it is of another model or engine, or longer than the context; nothing is changed then.
        """
        if len(self.held) >= ASIDE_TOKENS:
            self._keep_aside(self.held)
        self.decoder.restore(snapshot)
        self._held = list(keys)

    def park(self) -> Kept | None:
        """A snapshot of an answer that is interrupted, pinned for `resume`; None if there is no room."""
        held = self.held
        if not held or not self._room():
            return None
        return self.pool.add(list(held), self.decoder.snapshot(), passing=True, pinned=True)

    def resume(self, parked: Kept) -> None:
        """Makes what `park` returned what the decoder's cache holds."""
        if self.held != parked.keys:
            self.adopt(parked.keys, parked.snapshot)

    def snapshot_of(self, keys: Keys) -> tuple[Keys, KvSnapshot] | None:
        """The longest snapshot that begins with `keys`, and its keys; None if there is none."""
        if self.held[: len(keys)] == keys:
            return list(self.held), self.decoder.snapshot()
        return self.pool.longest(keys)

    def distrust(self) -> None:
        """Forgets what may be broken: the decoder's cache, snapshots in memory, and files of its prompt."""
        if self.files:
            self.files.forget(self.held)
        self.reset()

    def reset(self) -> None:
        """Empties the decoder's cache and forgets the snapshots in memory."""
        self._held = None
        self.pool.clear()
        self.decoder.reset()
        self._held = []

    def _room(self) -> bool:
        return self.pool.make_room(self.decoder.snapshot_bytes(self.decoder.position))

    def _keep_aside(self, held: Keys) -> None:
        if not self.pool.covers(held) and self._room():
            self.pool.add(held, self.decoder.snapshot(), passing=True)
