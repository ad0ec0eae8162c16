"""Images of other sizes: each is as many tokens, and what transformers makes of it; others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_edge.cli.main import main
from gemma_edge.export.emit.reference.reference_vision import evaluate_vision
from gemma_edge.export.exporter import describe_source, export_bundle
from gemma_edge.export.gate.parity import verify_bundle
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.media.attachments import Attachment, Reader
from gemma_edge.runtime.media.encoder_pool import load_encoder
from support.random_gemma3n_vision import random_pixels, random_tower, tiny_vision_config, transformers_model

OTHER_SIZES = (128, 192)  # of the tiny checkpoint, whose own is 64: pools of 2 and 3, as 512 and 768 have


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("sizes") / "tiny", encoders=True, progress=False).path


def relative(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def test_the_published_sizes() -> None:
    config = VisionConfig.from_dict({"vision_config": {}, "text_config": {}})
    assert config.image_sizes == (256, 512, 768)
    assert [config.resized(size).pool for size in config.image_sizes] == [1, 2, 3]
    assert {config.resized(size).soft_tokens for size in config.image_sizes} == {256}
    with pytest.raises(UsageError, match="one of 256, 512, 768, not 384"):
        config.resized(384)


@pytest.mark.parametrize("size", OTHER_SIZES)
def test_the_reference_at_each_size_is_transformers(source: Path, size: int) -> None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm: {error}")
    import torch

    config, pixels = tiny_vision_config(source), random_pixels(size)
    with torch.no_grad():
        theirs = transformers_model(source).get_image_features(torch.from_numpy(pixels)[None])
    ours = evaluate_vision(random_tower(config), config.resized(size), pixels)
    assert relative(ours, theirs.pooler_output[0].numpy()) < 1e-4


@pytest.mark.parametrize(
    ("format", "size"), [("onnx", 128), ("onnx", 192), ("tflite", 192), ("litertlm", 128)]
)
def test_a_bundle_at_each_size_is_the_reference(source: Path, tmp_path: Path, format: str, size: int) -> None:
    out = tmp_path / ("m.litertlm" if format == "litertlm" else "bundle")
    options: dict[str, Any] = {"recipe": "fp32", "context": 64, "chunk": 32, "verify": False}
    bundle = Bundle.open(export_bundle(source, out, format=format, image_size=size, **options).path)
    vision = bundle.vision
    assert vision is not None and vision.config.image_size == size and vision.soft_tokens == 16
    (image,) = Reader(bundle.modalities, context=64).value(np.zeros((40, 30, 3), np.uint8), "image")
    assert isinstance(image, Attachment) and image.data.shape == (3, size, size)
    config, pixels = tiny_vision_config(source), random_pixels(size)
    with load_encoder(bundle, vision, threads=1) as encoder:
        got = encoder.encode(pixels)
    assert relative(got, evaluate_vision(random_tower(config), config.resized(size), pixels)) < 1e-3


def test_the_gate_and_verify_take_the_bundle_s_size(source: Path, tmp_path: Path) -> None:
    made = export_bundle(source, tmp_path / "out", context=64, chunk=32, image_size=128)
    assert made.agreement is not None and made.agreement.encoders is not None
    again = verify_bundle(tmp_path / "out", source)
    assert again.encoders == pytest.approx(made.agreement.encoders)


def test_the_plan_counts_the_memory_of_the_size(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = {}
    for size in (64, *OTHER_SIZES):
        options = ["--image-size", str(size), "--dry-run", "--json", "--recipe", "fp32", "--context", "64"]
        assert main(["export", str(source), *options]) == 0
        parts = {part["part"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
        memory[size] = parts["vision"]["memory_bytes"]
    assert 0 < memory[64] < memory[128]
    assert (memory[192] - memory[64]) / (memory[128] - memory[64]) == pytest.approx((9 - 1) / (4 - 1), 1e-5)


def test_other_sizes_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one of 64, 128, 192, not 100"):
        export_bundle(source, tmp_path / "out", image_size=100)
    with pytest.raises(UsageError, match="no image encoder"):
        describe_source(str(source), ["text"], image_size=128)
    assert not (tmp_path / "out").exists()
