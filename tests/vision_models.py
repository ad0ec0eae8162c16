"""Small random image encoders: weights in a dictionary, and the same weights in timm.

Weights are drawn as a synthetic checkpoint's are, from a generator whose stream never changes, so that golden
outputs need not store them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.model.tensors import TensorSpec
from gemma_edge.export.model.vision_tensors import TOWER, vision_specs
from gemma_edge.export.synth import RandomTensor, random_block
from gemma_edge.export.synth_towers import vision_moments
from gemma_edge.runtime.vision_config import VisionConfig

Array = NDArray[np.float32]


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
    bits = random_block(tensor, 0, seed)
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
