"""Small random image encoders: weights in a dictionary, and the same weights in timm.

Weights are drawn as a synthetic checkpoint's are, from a generator whose stream never changes, so that golden
outputs need not store them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.model.gemma3n.gemma3n_vision_tensors import TOWER, vision_specs
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.synth.synth_checkpoint import BLOCK, RandomTensor, random_block
from gemma_edge.export.synth.synth_towers import vision_moments
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig

Array = NDArray[np.float32]

# One of each kind of block, by stage and index: its output is in the golden file.
GOLDEN_BLOCKS = ((0, 0), (0, 1), (1, 0), (1, 1), (2, 8), (2, 9), (3, 1))


def small_config(image_size: int = 64, grid: int = 4, multiplier: float = 0.05) -> VisionConfig:
    """All blocks of the published encoder, 20 times narrower."""
    return VisionConfig.from_dict(
        {
            "vision_config": {
                "vocab_size": 6,
                "vocab_offset": 90,
                "model_args": {"channel_multiplier": multiplier, "msfa_output_resolution": grid},
            },
            "text_config": {"hidden_size": 32},
            "vision_soft_tokens_per_image": grid * grid,
        },
        preprocessor={"size": {"height": image_size, "width": image_size}},
    )


@dataclass
class TowerSource:
    """A `WeightSource` over arrays."""

    config: Any
    weights: dict[str, Array]

    def read(self, name: str) -> Array:
        return self.weights[name]

    def rows(self, name: str, start: int, stop: int) -> Array:
        return self.weights[name][start:stop]


def random_tower(config: VisionConfig, seed: int = 0) -> TowerSource:
    return TowerSource(config, draw(vision_specs(config), seed))


def draw(specs: dict[str, TensorSpec], seed: int = 0) -> dict[str, Array]:
    return {name: _draw(spec, seed) for name, spec in specs.items()}


def _draw(spec: TensorSpec, seed: int) -> Array:
    tensor = RandomTensor(spec.name, spec.shape, *vision_moments(spec))
    bits = np.concatenate([random_block(tensor, i, seed) for i in range(-(-spec.size // BLOCK))])
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(spec.shape)


def random_pixels(size: int, seed: int = 0) -> Array:
    """(3, size, size): a smooth picture with noise on it."""
    random = np.random.SFC64(seed).random_raw
    coarse = (random(3 * 8 * 8) >> np.uint64(40)).astype(np.float32).reshape(3, 8, 8) / 2**24
    fine = (random(3 * size * size) >> np.uint64(40)).astype(np.float32).reshape(3, size, size) / 2**24
    return 0.7 * coarse.repeat(size // 8, axis=1).repeat(size // 8, axis=2) + 0.3 * fine


def timm_state(
    specs: dict[str, TensorSpec], weights: dict[str, Array], prefix: str = TOWER
) -> dict[str, Any]:
    """Weights below `prefix` as timm's state dict."""
    import torch

    return {
        name[len(prefix) :]: torch.from_numpy(weights[name].reshape(spec.stored_shape))
        for name, spec in specs.items()
        if name.startswith(prefix)
    }


def timm_encoder(config: VisionConfig, source: TowerSource) -> Any:
    """`source` as timm's MobileNetV5Encoder in eval mode."""
    import timm
    import torch

    torch.set_num_threads(2)
    model = timm.create_model(
        "mobilenetv5_300m_enc",
        channel_multiplier=config.channel_multiplier,
        msfa_output_resolution=config.grid,
    )
    model.load_state_dict(timm_state(vision_specs(config), source.weights), strict=True)
    return model.eval()


def tiny_vision_config(folder: Path) -> VisionConfig:
    """Of a synthetic checkpoint."""
    config, preprocessor = (
        json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")
    )
    return VisionConfig.from_dict(config, folder / "config.json", preprocessor)


def transformers_model(folder: Path) -> Any:
    """The multimodal model of a synthetic checkpoint."""
    import torch
    from transformers import Gemma3nModel

    torch.set_num_threads(2)
    model, info = Gemma3nModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"transformers misses {info['missing_keys']}, and has no {info['unexpected_keys']}")
    return model.eval()
