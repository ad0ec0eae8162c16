"""The image encoder: the description on NumPy and on ONNX Runtime, against timm and transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from vision_models import Array, TowerSource, random_pixels, random_tower, small_config, timm_encoder

from gemma_edge.export.emit.onnx_vision import emit_vision
from gemma_edge.export.emit.reference_vision import (
    ReferenceVisionOps,
    evaluate_vision,
)
from gemma_edge.export.model import vision
from gemma_edge.export.model.vision_tensors import vision_specs
from gemma_edge.export.recipe import load_recipe
from gemma_edge.runtime.vision import VisionEncoder
from gemma_edge.runtime.vision_config import VisionConfig

# Without a pool, with one of 3 x 3 as published, and wider.
CONFIGS = {
    "64": small_config(),
    "192_pooled": small_config(192, grid=4),
    "64_wider": small_config(64, grid=2, multiplier=0.0625),
}


@cache
def tower(name: str) -> TowerSource:
    return random_tower(CONFIGS[name])


@cache
def reference(name: str) -> Array:
    return evaluate_vision(tower(name), CONFIGS[name], random_pixels(CONFIGS[name].image_size))


def relative(got: Array, expected: Array) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def write_vision(folder: Path, source: TowerSource, config: VisionConfig, recipe: str = "fp32") -> Path:
    emitted = emit_vision(config, load_recipe(recipe))
    with open(folder / "vision.onnx.data", "wb") as file:
        emitted.data.write(file, source, "none")
    path = folder / "vision.onnx"
    path.write_bytes(emitted.model.SerializeToString())
    return path


def timm() -> None:
    """Skips without timm and a torchvision that imports beside torch."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm: {error}")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_is_timm_s_encoder(name: str) -> None:
    timm()
    import torch

    config, source = CONFIGS[name], tower(name)
    pixels = random_pixels(config.image_size)
    with torch.no_grad():
        expected = timm_encoder(config, source)(torch.from_numpy(pixels)[None])[0].numpy().transpose(1, 2, 0)
    ops = ReferenceVisionOps(source, vision_specs(config), 1e-6)
    got = vision.encoder(ops, config, pixels.transpose(1, 2, 0))
    assert got.shape == expected.shape == (config.grid, config.grid, 2048)
    assert relative(got, expected) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_onnx_is_the_reference(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    with VisionEncoder(write_vision(tmp_path, tower(name), config)) as encoder:
        got = encoder.encode(random_pixels(config.image_size))
    assert got.shape == (config.soft_tokens, config.text_hidden_size)
    assert relative(got, reference(name)) < 1e-3
