"""`BufferedDecoder`: the position and the snapshots of a decoder whose KV cache lies in arrays of its own."""

from __future__ import annotations

from gemma_edge.runtime.engines.decoder import Decoder, check_fit, check_truncation
from gemma_edge.runtime.engines.kv_snapshot import KvBuffers, KvSnapshot


class BufferedDecoder(Decoder):
    """See `Decoder`. A subclass feeds tokens, and puts its arrays into `buffers`."""

    buffers: KvBuffers

    def reset(self) -> None:
        self.position = 0

    def earliest_at(self, position: int) -> int:
        return self.buffers.earliest_at(position)

    def can_verify(self, rows: int) -> bool:
        behind = self.position + rows
        return behind <= self.context and self.buffers.earliest_at(behind) <= self.position

    def truncate(self, position: int) -> None:
        check_truncation(self, position)
        self.position = position

    def snapshot(self) -> KvSnapshot:
        return self.buffers.snapshot(self.position)

    def snapshot_bytes(self, position: int) -> int:
        return self.buffers.bytes(position)

    def restore(self, snapshot: KvSnapshot) -> None:
        check_fit(self, snapshot)
        self.buffers.restore(snapshot)
        self.position = snapshot.position
