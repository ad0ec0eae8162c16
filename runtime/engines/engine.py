"""`Engine`: the protocol of a library that runs decoders and encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.engines.encoder_graph import EncoderGraph


class Engine(Protocol):
    """One engine. Its library is imported when something is loaded, not before.

    Attributes:
        name: for people.
        distribution: on PyPI; a record states its version.
        module: what Python imports of it.
        graph_suffix: of its files of graphs.
        packs_weights: the first load writes packed weights into the cache folder, and they are mapped from
            then on; otherwise weights are resident, unless `pack_weights` was called for the bundle.
        any_chunk: whether a prefill call may have any number of tokens.
    """

    name: str
    distribution: str
    module: str
    graph_suffix: str
    packs_weights: bool
    any_chunk: bool

    @property
    def version(self) -> str:
        """Of the library that is installed."""

    def largest_context(self, bundle: Bundle) -> int:
        """Tokens of KV cache that the bundle can be loaded with at most."""

    def load_decoder(self, bundle: Bundle, *, threads: int | None, context: int | None) -> Decoder:
        """See `engine_registry.load_decoder`."""

    def pack_weights(self, bundle: Bundle) -> None:
        """Writes the decoder's packed weights into the cache folder, unless they are there. Loads map them.

        Raises:
            BundleError: the decoder is damaged.
            DeviceError: the file cannot be written.
        """

    def load_encoder(self, kind: Kind, path: Path, *, threads: int | None, digest: str) -> EncoderGraph:
        """The encoder in a file.

        Args:
            threads: worker threads; None for one a physical core.
            digest: SHA-256 of the file; "" if it is not known.

        Raises:
            BundleError: there is no such file, it is damaged, or it holds no encoder of that kind.
        """
