"""What a bundle says of images and audio: the encoder of each, what it is given, and the token ids around it.

The manifest's `modalities` has "vision", "audio", both, or is absent from a bundle that reads text alone:

    {"vision": {"graph": "vision.onnx", "config": {...}, "preprocessor": {...}, "size": 768,
                "soft_tokens": 256, "soft_id": 262145, "begin_id": 255999, "end_id": 262144,
                "tokens": {"file": "vision_tokens.bin", "rows": 128, ..., "first_id": 262144},
                "memory": {"resident": bytes, "activations": bytes}},
     "audio": {the same without "size"}}

`tokens` is the layout of a table (`runtime.artifacts.row_table`) of the rows that stand for token ids from
`first_id` up instead of the text model's own: they are in its space already and are not scaled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.folder_bundle import Container
from gemma_edge.runtime.artifacts.manifest import EXPORT_AGAIN, Json
from gemma_edge.runtime.artifacts.row_table import RowLayout, RowTable
from gemma_edge.runtime.errors import BundleError, ConfigError
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.families.log_mel import LogMel
from gemma_edge.runtime.families.model_family import ModelFamily

Kind = Literal["vision", "audio"]
KINDS: tuple[Kind, ...] = ("vision", "audio")
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Modality(ABC):
    """What images and audio have in common.

    Attributes:
        kind: "vision" or "audio".
        config: of the encoder.
        graph: the file of the encoder, by its name in the bundle.
        soft_tokens: rows that the encoder gives for one image or clip.
        soft_id: the token that each of these rows stands in the place of.
        begin_id, end_id: the tokens before and after them.
        tokens_file, tokens: the table of the modality's own token ids: its file, and its layout.
        first_id: the token id of the table's first row.
        resident, activations: bytes of anonymous memory that the encoder takes once it is loaded, and that
            one run of it takes on top, as the plan predicts them.
    """

    kind: Kind
    config: VisionConfig | AudioConfig
    graph: str
    soft_tokens: int
    soft_id: int
    begin_id: int
    end_id: int
    tokens_file: Path
    tokens: Mapping[str, Any]
    first_id: int
    resident: int
    activations: int

    @property
    def ids(self) -> range:
        """The token ids that have a row in the modality's own table."""
        return range(self.first_id, self.first_id + int(self.tokens["rows"]))

    @abstractmethod
    def encoder_inputs(self, data: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """The arguments of the encoder's `encode` for what an `Attachment` holds."""

    def token_table(self) -> RowTable:
        """Rows of `ids`, counted from `first_id`: of the text model's width, not to be scaled."""
        return RowTable(self.tokens_file, self.tokens)


@dataclass(frozen=True)
class VisionModality(Modality):
    """Images: `config` has the size of the pixels and the filter that scales a picture to them."""

    config: VisionConfig

    def encoder_inputs(self, data: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Pixels in [0, 1] of u8 (3, size, size)."""
        return (data * np.float32(1 / 255),)


@dataclass(frozen=True)
class AudioModality(Modality):
    """Audio: `log_mel` makes the encoder's input of samples."""

    config: AudioConfig
    log_mel: LogMel

    def encoder_inputs(self, data: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Log-mel frames and their mask of samples, f32 (n,)."""
        return self.log_mel(data)


def read_modalities(container: Container, family: ModelFamily, config: Gemma3nConfig) -> dict[str, Modality]:
    """The manifest's `modalities`, checked; empty for a bundle that takes text alone.

    Args:
        family: reads the configs of the encoders.
        config: of the text model, whose vocabulary and width they must have.

    Raises:
        BundleError: a key is missing, malformed, or contradicts another.
    """
    value, path = container.manifest.get("modalities", {}), container.manifest_path
    if not isinstance(value, dict) or not set(value) <= set(KINDS):
        raise BundleError(path, "modalities", f"an object of {' and '.join(KINDS)}", repr(value)[:80])
    return {
        kind: _Parser(container, kind, value[kind], family, config).modality()
        for kind in KINDS
        if kind in value
    }


class _Parser:
    """Takes one modality apart, checking every field by its name."""

    def __init__(
        self, container: Container, kind: Kind, value: object, family: ModelFamily, config: Gemma3nConfig
    ) -> None:
        self.container, self.path, self.kind = container, container.manifest_path, kind
        self.family, self.text = family, config
        if not isinstance(value, dict):
            raise self.error("", "an object", value)
        self.value: Json = value

    def error(self, key: str, expected: object, got: object) -> BundleError:
        field = f"modalities.{self.kind}" + (f".{key}" if key else "")
        return BundleError(self.path, field, expected, repr(got)[:80], EXPORT_AGAIN)

    def record(self, key: str) -> Json:
        value = self.value.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return value

    def text_value(self, key: str) -> str:
        value = self.value.get(key)
        if not isinstance(value, str):
            raise self.error(key, "the name of a file", value)
        return value

    def integer(self, key: str, below: int = 2**62, of: Json | None = None) -> int:
        value = (self.value if of is None else of).get(key.rpartition(".")[2])
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
            raise self.error(key, f"an integer from 0 to {below - 1}", value)
        return value

    def common(self, soft_tokens: int, vocab_offset: int, vocab_size: int, text_hidden: int) -> Json:
        """The fields of `Modality`; arguments are what the encoder's config says."""
        if text_hidden != self.text.hidden_size:
            raise self.error("config", f"an encoder for {self.text.hidden_size} values a token", text_hidden)
        if self.value.get("soft_tokens") != soft_tokens:
            raise self.error("soft_tokens", f"{soft_tokens}, as in config", self.value.get("soft_tokens"))
        tokens, memory = dict(self.record("tokens")), self.record("memory")
        first_id = self.integer("tokens.first_id", self.text.vocab_size, tokens)
        tokens.pop("first_id")
        name = tokens.get("file")
        if not isinstance(name, str):
            raise self.error("tokens.file", "the name of a file", name)
        graph, table = self.text_value("graph"), self.container.file(name)
        if graph not in self.container.files:
            raise BundleError(self.path, "files", graph, "no such entry", EXPORT_AGAIN)
        layout = RowLayout.parse(tokens, self.path, table.stat().st_size)
        if (first_id, layout.rows, layout.columns) != (vocab_offset, vocab_size, text_hidden):
            expected = f"{vocab_size} rows of {text_hidden} from id {vocab_offset} on, as in config"
            raise self.error("tokens", expected, (layout.rows, layout.columns, first_id))
        return {
            "kind": self.kind,
            "graph": graph,
            "soft_tokens": soft_tokens,
            **{key: self.integer(key, self.text.vocab_size) for key in ("soft_id", "begin_id", "end_id")},
            "tokens_file": table,
            "tokens": tokens,
            "first_id": first_id,
            **{key: self.integer(f"memory.{key}", of=memory) for key in ("resident", "activations")},
        }

    def modality(self) -> Modality:
        data, preprocessor = self.record("config"), self.record("preprocessor")
        try:
            if self.kind == "vision":
                vision = self.family.vision_config(data, self.path, preprocessor)
                if self.value.get("size") != vision.image_size:
                    raise self.error("size", f"{vision.image_size}, as in config", self.value.get("size"))
                return VisionModality(
                    **self.common(
                        vision.soft_tokens, vision.vocab_offset, vision.vocab_size, vision.text_hidden_size
                    ),
                    config=vision,
                )
            audio, log_mel = (
                self.family.audio_config(data, self.path),
                self.family.log_mel(preprocessor, self.path.with_name(PREPROCESSOR)),
            )
            if log_mel.feature_size != audio.input_feat_size:
                raise self.error("preprocessor", f"{audio.input_feat_size} bins", log_mel.feature_size)
            return AudioModality(
                **self.common(
                    audio.soft_tokens, audio.vocab_offset, audio.vocab_size, audio.text_hidden_size
                ),
                config=audio,
                log_mel=log_mel,
            )
        except ConfigError as error:
            key = "preprocessor" if error.path != self.path else "config"
            raise self.error(f"{key}: {error.field}", error.expected, error.got) from None
