"""The encoder of images or of audio in a checkpoint, whatever its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig

Json = dict[str, Any]


@dataclass(frozen=True)
class Tower:
    """The encoder of a modality, as a checkpoint describes it.

    Attributes:
        specs: its tensors in a checkpoint, by name.
        preprocessor: how pixels or samples become its input, as the manifest records it.
        soft_id, begin_id, end_id: token ids, as in `gemma_edge.runtime.artifacts.modalities.Modality`.
    """

    kind: Kind
    config: VisionConfig | AudioConfig
    specs: Mapping[str, TensorSpec]
    preprocessor: Json
    soft_id: int
    begin_id: int
    end_id: int

    def entry(self, graph: str, tokens: Json, resident: int, activations: int) -> Json:
        """The tower's entry in the manifest.

        Args:
            graph: name of its file.
            tokens: the layout of its token table.
            resident, activations: bytes, see `Modality`.
        """
        size = {"size": self.config.image_size} if isinstance(self.config, VisionConfig) else {}
        return {
            "graph": graph,
            "config": self.config.to_dict(),
            "preprocessor": self.preprocessor,
            **size,
            "soft_tokens": self.config.soft_tokens,
            "soft_id": self.soft_id,
            "begin_id": self.begin_id,
            "end_id": self.end_id,
            "tokens": {**tokens, "first_id": self.config.vocab_offset},
            "memory": {"resident": resident, "activations": activations},
        }
