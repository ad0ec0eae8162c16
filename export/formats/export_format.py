"""The protocol of an export format, which plans, checks, writes and publishes an artifact.

A format is a folder beside this file with an object `FORMAT` that has this protocol, and a line in
the runtime's `artifact_formats.py`. The plan, the exporter and the command line ask the object and never
compare names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.side_files import SideFiles
from gemma_edge.export.formats.observed_decoder import ObservedDecoder
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.export.publish import BundleWriter
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.export.weights.rounding import Rounding
from gemma_edge.export.weights.stored_matrix import StoredMatrix
from gemma_edge.export.weights.stored_tensor import StoredTensor
from gemma_edge.runtime.artifacts.artifact_formats import ArtifactFormat
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.families.model_family import TextConfig

Json = dict[str, Any]


@dataclass(frozen=True)
class ExportJob:
    """One export: a model, the precision of its weights, and the sizes that a graph may fix.

    context: tokens of KV cache.
    chunk: tokens of one prefill call.
    snapshots: bytes for KV snapshots of other conversations.
    """

    config: TextConfig
    recipe: Recipe
    context: int
    chunk: int
    towers: Mapping[Kind, Tower] = field(default_factory=dict)
    snapshots: int = 0


class WeightLayout(Protocol):
    """Where an emitter has laid out the weights of a file."""

    tensors: list[StoredTensor]
    size: int  # bytes

    def chunks(self, source: WeightSource, tensor: StoredTensor) -> Iterator[NDArray[np.float32]]:
        """The values of a tensor, in the order in which they are stored."""


@dataclass(frozen=True)
class EncoderFile:
    """An encoder as a format stores it.

    graph: name of its file.
    resident, activations: bytes of anonymous memory that the loaded encoder takes, and that one run of it
        adds.
    write: streams the weights; its last argument is told the elements done.
    """

    graph: str
    layout: WeightLayout
    resident: int
    activations: int
    write: Callable[[BundleWriter, WeightSource, Rounding, Callable[[int], None]], None]


class Artifact(Protocol):
    """An artifact on its way: prepared, written, published.

    writer: collects its files; leaving its context without `publish` removes them.
    path: where the artifact can be opened once it is written, before it is published.
    """

    @property
    def writer(self) -> BundleWriter: ...
    @property
    def path(self) -> Path: ...

    def write(
        self, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], rounding: Rounding, progress: bool
    ) -> None:
        """Streams the weights, one tensor in memory at a time.

        Args:
            prompts: token ids on which the scales of an int8 cache may be measured.
            rounding: of the decoder's weights.
        """

    def record_agreement(self, agreement: Json) -> None:
        """Stores the findings of the parity gate."""

    def publish(self) -> Path:
        """Puts the artifact in the place of the target and returns the target."""


class ExportFormat(Protocol):
    """One way to store a model.

    runtime: the runtime's half, with the name and the suffix of the artifact.
    int8_by_default: a recipe's int8 KV cache is taken unless another one is asked for; otherwise fp32 is.
    mapped: the engine leaves the decoder's weights in mapped pages of a file.
    base_bytes: anonymous memory of interpreter, engine and graph, without weights, cache and tokenizer.
    decoder: name of the file with the decoder's graph.
    """

    @property
    def runtime(self) -> ArtifactFormat: ...
    @property
    def int8_by_default(self) -> bool: ...
    @property
    def mapped(self) -> bool: ...
    @property
    def base_bytes(self) -> int: ...
    @property
    def decoder(self) -> str: ...

    def unsupported(self, config: TextConfig, recipe: Recipe) -> str | None:
        """Why the format cannot hold this model in this precision, or None."""

    def decoder_layout(self, job: ExportJob) -> WeightLayout:
        """The decoder's weights as the format stores them; reads none."""

    def encoder_file(self, tower: Tower, recipe: Recipe) -> EncoderFile:
        """An encoder as the format stores it; reads no weight."""

    def has_embedder(self, config: TextConfig) -> bool:
        """Whether the token embeddings are a table of their own, beside the head."""

    def kv_cache_bytes(self, job: ExportJob) -> int:
        """Memory of the KV cache and of the tables that grow with it."""

    def room_bytes(self, file_bytes: int) -> int:
        """Disk space that writing an artifact of `file_bytes` needs."""

    def stored(self, bundle: Bundle, graph: str) -> dict[str, StoredMatrix]:
        """The weights of a graph of a finished bundle by name, as the graph itself places them.

        Raises:
            BundleError: the graph names weights in a way that no export does.
        """

    def observed_decoder(self, bundle: Bundle, scratch: Path) -> ObservedDecoder:
        """The bundle's decoder, to be observed.

        Args:
            scratch: a folder for files that it needs as long as it lives.
        """

    def prepare(self, job: ExportJob, files: SideFiles, facts: Json, target: Path) -> Artifact:
        """Makes everything that needs no weight, and refuses what cannot be exported.

        Args:
            facts: the part of the manifest that all formats share.
            target: where the artifact is published.

        Raises:
            UsageError: `target` exists and is no artifact of this kind.
            ConfigError, TokenizerError: the format cannot hold the checkpoint's config or tokenizer.
        """
