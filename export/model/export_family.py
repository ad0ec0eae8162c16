"""`ExportFamily`: a model family's config, tensors, description and encoders, as the exporter needs them.

A family is a folder beside this file with an object of this class, and a line in `export_families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from gemma_edge.export.model.model_slice import Slicing
from gemma_edge.export.model.ops import Ops
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.model.tower import EncoderModel, Json, Tower
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.families.model_family import ModelFamily, TextConfig

T = TypeVar("T")


class TextModel(Protocol):
    """The description of the text model: a module of functions over `Ops`."""

    def hidden_states(
        self, ops: Ops[T], config: TextConfig, embeddings: T, ple_low: T, ple_high: T | None
    ) -> T:
        """Hidden states of the wanted rows, after the final norm.

        Args:
            embeddings: (tokens, hidden), scaled token embeddings or soft tokens.
            ple_low: (tokens, columns), scaled per-layer rows of the layers that own KV.
            ple_high: those of the layers that share KV, for the wanted rows; None where no layer does.
        """

    def logits(self, ops: Ops[T], config: TextConfig, hidden: T) -> T:
        """(tokens, hidden) -> (tokens, vocab)."""

    def decoder(self, ops: Ops[T], config: TextConfig, embeddings: T, ple_low: T, ple_high: T | None) -> T:
        """`logits` of `hidden_states`."""

    def activation_bytes(self, config: TextConfig, chunk: int) -> int:
        """The largest set of tensors alive at once in a prefill call of `chunk` tokens."""


@dataclass(frozen=True)
class ExportFamily:
    """The exporter's half of a model family.

    Attributes:
        runtime: the runtime's half, with the name and the default chat template.
        config_type: the class of the text model's config.
        read_config: the config of the text model in a checkpoint's folder; raises ConfigError.
        tensor_specs: every tensor that the text model reads, by canonical name, in the order of use.
        unused_names: tensors that a checkpoint may hold although no layer reads them.
        text: the description of the text model.
        encoders: the descriptions of the encoders.
        read_tower: an encoder that config.json describes, of: its kind, the parsed config.json, its path, a
            function that parses the side file of a name ({} if it is missing), the config of the text model.
            Raises ConfigError.
        slicing: how its models are cut into smaller ones.
        turns: what comes before a user's turn, before the model's, and after each, in sessions of LiteRT-LM
            that render no template.
    """

    runtime: ModelFamily
    config_type: type
    read_config: Callable[[Path], TextConfig]
    tensor_specs: Callable[[TextConfig], dict[str, TensorSpec]]
    unused_names: Callable[[TextConfig], set[str]]
    text: TextModel
    encoders: Mapping[Kind, EncoderModel]
    read_tower: Callable[[Kind, Json, Path, Callable[[str], Json], TextConfig], Tower]
    slicing: Slicing
    turns: tuple[str, str, str]

    def tower_of(self, name: str) -> Kind | None:
        """The encoder that a tensor below `model.` belongs to, if any."""
        first = name.partition(".")[0]
        return next((kind for kind, encoder in self.encoders.items() if first in encoder.prefixes), None)
