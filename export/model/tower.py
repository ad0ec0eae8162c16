"""The encoder of images or of audio in a checkpoint, whatever its architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.families.model_family import EncoderConfig, PixelsConfig

Json = dict[str, Any]
# What an encoder reads. Each engine, the reference and the gate have a table with a line for each of these.
Inputs = Literal["pixels", "log_mel"]


@dataclass(frozen=True)
class EncoderModel:
    """The description of an encoder; its functions take the encoder's config.

    Attributes:
        name: of its graph.
        config_type: the class of its config.
        inputs: selects the function that emits or evaluates it.
        eps: of its RMS norms.
        prefixes: first parts of the names of its tensors below `model.`.
        specs: its tensors in a checkpoint, by name, in the order of use.
        graph_specs: its tensors in a graph: those of `specs`, or folded from them.
        soft_tokens: (ops, config, *inputs) -> (soft tokens, text hidden).
        largest_map: elements of its largest feature map, which its memory follows.
        token_table: (ops, source, config, first) -> the rows of its token ids from `first` up, (ids, text
            hidden): unscaled inputs of the text model.
        fold: (ops, source, config, name) -> a tensor of `graph_specs` that `specs` lacks.
    """

    name: str
    config_type: type
    inputs: Inputs
    eps: float
    prefixes: tuple[str, ...]
    specs: Callable[[Any], dict[str, TensorSpec]]
    graph_specs: Callable[[Any], dict[str, TensorSpec]]
    soft_tokens: Callable[..., Any]
    largest_map: Callable[[Any], int]
    token_table: Callable[..., Any]
    fold: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Tower:
    """The encoder of a modality, as a checkpoint describes it.

    Attributes:
        preprocessor: how pixels or samples become its input, as the manifest records it.
        size: pixels of a side of an image; None for audio.
        soft_id, begin_id, end_id: token ids, as in `gemma_edge.runtime.artifacts.modalities.Modality`.
    """

    kind: Kind
    model: EncoderModel
    config: EncoderConfig
    preprocessor: Json
    size: int | None
    soft_id: int
    begin_id: int
    end_id: int

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Its tensors in a checkpoint, by name."""
        return self.model.specs(self.config)

    def entry(self, graph: str, tokens: Json, resident: int, activations: int) -> Json:
        """The tower's entry in the manifest.

        Args:
            graph: name of its file.
            tokens: the layout of its token table.
            resident, activations: bytes, see `Modality`.
        """
        return {
            "graph": graph,
            "config": self.config.to_dict(),
            "preprocessor": self.preprocessor,
            **({"size": self.size} if self.size else {}),
            "soft_tokens": self.config.soft_tokens,
            "soft_id": self.soft_id,
            "begin_id": self.begin_id,
            "end_id": self.end_id,
            "tokens": {**tokens, "first_id": self.config.vocab_offset},
            "memory": {"resident": resident, "activations": activations},
        }


def with_image_size(towers: Mapping[Kind, Tower], image_size: int | None) -> dict[Kind, Tower]:
    """The towers, that of images for pixels of another size; None for its own. No weight depends on it.

    Raises:
        UsageError: the encoder does not take this size, or there is none.
    """
    if image_size is None:
        return dict(towers)
    tower = towers.get("vision")
    if tower is None or not isinstance(tower.config, PixelsConfig):
        raise UsageError(f"there is no image encoder here: leave out the image size of {image_size}")
    config = tower.config.resized(image_size)
    processor = config.to_dict()["image_processor"]
    return {**towers, "vision": replace(tower, config=config, preprocessor=processor, size=image_size)}
