"""The image encoder: the description on NumPy and on ONNX Runtime, against timm and transformers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.export.emit.onnx.onnx_vision import emit_vision
from gemma_edge.export.emit.reference.encoder_weights import token_table
from gemma_edge.export.emit.reference.reference_vision import (
    ReferenceVisionOps,
    evaluate_vision,
    same_padding,
)
from gemma_edge.export.model.gemma3n import gemma3n_vision as vision
from gemma_edge.export.model.gemma3n.gemma3n_vision_tensors import TOWER, block_specs, stages, vision_specs
from gemma_edge.export.model.ops import Weights
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.weights.recipe import load_recipe
from gemma_edge.export.weights.rounding import NearestRounding
from gemma_edge.runtime.engines import onnx_encoder
from gemma_edge.runtime.errors import BundleError, ConfigError
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.host import cpu_fingerprint
from gemma_edge.runtime.media.image_encoder import VisionEncoder
from support.random_gemma3n_vision import (
    GOLDEN_BLOCKS,
    Array,
    TowerSource,
    draw,
    random_pixels,
    random_tower,
    small_config,
    timm_encoder,
    timm_state,
    tiny_vision_config,
    transformers_model,
)

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


def distance(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def write_vision(folder: Path, source: TowerSource, config: VisionConfig, recipe: str = "fp32") -> Path:
    emitted = emit_vision(config, load_recipe(recipe))
    with open(folder / "vision.onnx.data", "wb") as file:
        emitted.data.write(file, source, NearestRounding("none"))
    path = folder / "vision.onnx"
    path.write_bytes(emitted.model.SerializeToString())
    return path


def timm() -> None:
    """Skips without timm and a torchvision that imports beside torch."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm: {error}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny synthetic checkpoint with its image encoder."""
    return synthesize(tmp_path_factory.mktemp("vision") / "tiny", encoders=True, progress=False).path


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(Path(__file__).parent / "golden" / "vision.npz") as file:
        return dict(file)


# Against timm and transformers. -------------------------------------------------------------------


def test_the_tensors_are_those_of_the_published_encoder(golden: dict[str, Any]) -> None:
    config = VisionConfig.from_dict({"vision_config": {}, "text_config": {}})
    specs = [(name, spec.stored_shape) for name, spec in vision_specs(config).items()]
    tower = [(name.removeprefix(TOWER), shape) for name, shape in specs if name.startswith(TOWER)]
    assert tower == [(name, tuple(shape)) for name, shape in json.loads(str(golden["layout"]))]
    assert [name for name, _ in specs[len(tower) :]] == [
        f"embed_vision.{name}.weight"
        for name in ("embedding", "hard_embedding_norm", "soft_embedding_norm", "embedding_projection")
    ]


@pytest.mark.parametrize(("stage", "index"), GOLDEN_BLOCKS)
def test_each_block_is_timm_s(stage: int, index: int, golden: dict[str, Any], tiny: Path) -> None:
    config = tiny_vision_config(tiny)
    source = random_tower(config)
    name = f"blocks.{stage}.{index}"
    ops = ReferenceVisionOps(source, vision_specs(config), 1e-6)
    got = vision.block(ops, Weights(f"{TOWER}{name}."), stages(config)[stage][index], golden[f"{name}.in"])
    assert relative(got, golden[f"{name}.out"]) < 1e-5


def test_soft_and_hard_tokens_are_transformers(golden: dict[str, Any], tiny: Path) -> None:
    config = tiny_vision_config(tiny)
    source = random_tower(config)
    assert relative(evaluate_vision(source, config, random_pixels(64)), golden["soft_tokens"]) < 1e-4
    assert relative(token_table(source, config), golden["token_table"]) < 1e-5


def test_transformers_reads_a_synthetic_checkpoint_and_agrees(tiny: Path) -> None:
    timm()
    import torch

    config, pixels = tiny_vision_config(tiny), random_pixels(64, seed=5)
    with torch.no_grad():
        features = transformers_model(tiny).get_image_features(torch.from_numpy(pixels)[None])
    got = evaluate_vision(random_tower(config), config, pixels)
    assert relative(got, features.pooler_output[0].numpy()) < 1e-4


@pytest.mark.parametrize(("stage", "index", "size"), [(0, 1, 24), (1, 0, 32), (2, 9, 24), (3, 1, 24)])
def test_true_size_blocks_are_timm_s(stage: int, index: int, size: int) -> None:
    timm()
    import timm as library
    import torch

    config = VisionConfig.from_dict({"vision_config": {}, "text_config": {}})
    block, prefix = stages(config)[stage][index], f"{TOWER}blocks.{stage}.{index}."
    specs = {spec.name: spec for spec in block_specs(prefix, block)}
    source = TowerSource(config, draw(specs))
    with torch.device("meta"):
        module = library.create_model("mobilenetv5_300m_enc").blocks[stage][index]
    module = module.to_empty(device="cpu").eval()
    module.load_state_dict(timm_state(specs, source.weights, prefix), strict=True)
    x = np.random.default_rng(0).standard_normal((size, size, block.channels), dtype=np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x.transpose(2, 0, 1).copy())[None])[0].numpy().transpose(1, 2, 0)
    got = vision.block(ReferenceVisionOps(source, specs, 1e-6), Weights(prefix), block, x)
    assert relative(got, expected) < 1e-4


@pytest.mark.parametrize("name", ["192_pooled", "64_wider"])
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


# Artifacts. ---------------------------------------------------------------------------------------


def test_quantized_linear_layers_stay_near(tmp_path: Path) -> None:
    """77 blocks of random weights, 16 times narrower than published, amplify what is rounded."""
    config, source = CONFIGS["64_wider"], tower("64_wider")
    with VisionEncoder(write_vision(tmp_path, source, config, "int8")) as encoder:
        got = encoder.encode(random_pixels(64))
    expected = reference("64_wider")
    assert 1e-4 < distance(got, expected) < 0.15  # 0.050 with activations of 8 bits
    full = sum(4 * array.size for array in source.weights.values())
    assert (tmp_path / "vision.onnx.data").stat().st_size < 0.4 * full


def test_activations_of_seven_bits_where_sums_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the CPU is: the runtime replaces the graph's constants, or it does not."""
    rows = []
    path = write_vision(tmp_path, tower("64_wider"), CONFIGS["64_wider"], "int8")
    for narrow in (False, True):
        monkeypatch.setattr(onnx_encoder, "adds_in_16_bits", lambda narrow=narrow: narrow)
        onnx_encoder.narrow_activations.cache_clear()
        with VisionEncoder(path, threads=1) as encoder:
            rows.append(encoder.encode(random_pixels(64)))
    onnx_encoder.narrow_activations.cache_clear()
    assert not np.array_equal(rows[0], rows[1])
    assert distance(rows[1], reference("64_wider")) < 0.15


@pytest.mark.parametrize(
    ("flags", "narrow"),
    [("fpu sse2 avx2", True), ("sse2 avx2 avx_vnni", False), ("sse2 avx512_vnni", False), ("asimd", False)],
)
def test_which_cpus_add_in_16_bits(
    flags: str, narrow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(cpu_fingerprint, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_fingerprint.adds_in_16_bits.__wrapped__() is narrow


def test_the_encoder_checks_what_it_is_given(tmp_path: Path) -> None:
    encoder = VisionEncoder(write_vision(tmp_path, tower("64"), CONFIGS["64"]))
    assert (encoder.image_size, encoder.soft_tokens, encoder.hidden_size) == (64, 16, 32)
    with pytest.raises(ValueError, match="pixels must be"):
        encoder.encode(np.zeros((3, 32, 64), np.float32))
    encoder.close()
    with pytest.raises(ValueError, match="closed"):
        encoder.encode(random_pixels(64))
    with pytest.raises(BundleError, match=r"vision\.onnx"):
        VisionEncoder(tmp_path / "none" / "vision.onnx")
    (tmp_path / "vision.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="ONNX Runtime loads"):
        VisionEncoder(tmp_path / "vision.onnx")


def test_same_padding() -> None:
    """As TensorFlow: an odd pixel of padding comes last."""
    assert [same_padding(768, 3, 2), same_padding(5, 3, 2), same_padding(96, 5, 2)] == [
        (0, 1),
        (1, 1),
        (1, 2),
    ]


# The config. --------------------------------------------------------------------------------------


def test_the_published_config() -> None:
    config = VisionConfig.from_dict({"vision_config": {}, "text_config": {"hidden_size": 2048}})
    assert (config.image_size, config.soft_tokens, config.pool, config.resample) == (768, 256, 3, "bilinear")
    assert VisionConfig.from_dict(config.to_dict()) == config


BAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "architecture": ({"vision_config": {"architecture": "resnet50"}}, {}),
    "rms_norm_eps": ({"vision_config": {"rms_norm_eps": 1e-3}}, {}),
    "hidden_size": ({"vision_config": {"hidden_size": 1024}}, {}),
    "vocab_size": ({"vision_config": {"vocab_size": 0}}, {}),
    "vision_config": ({"vision_config": None}, {}),
    "features_only": ({"vision_config": {"model_args": {"features_only": True}}}, {}),
    "channel_multiplier": ({"vision_config": {"model_args": {"channel_multiplier": -1}}}, {}),
    "vision_soft_tokens_per_image": ({"vision_soft_tokens_per_image": 100}, {}),
    "do_normalize": ({}, {"do_normalize": True}),
    "resample": ({}, {"resample": 1}),
    "size": ({}, {"size": {"height": 700, "width": 700}}),
    "size.width": ({}, {"size": {"height": 768, "width": 512}}),
}


@pytest.mark.parametrize("field", BAD)
def test_what_is_not_supported_is_refused_by_name(field: str) -> None:
    changes, preprocessor = BAD[field]
    data = {"vision_config": {}, "text_config": {"hidden_size": 32}} | changes
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")) as error:
        VisionConfig.from_dict(data, preprocessor={"do_resize": True} | preprocessor)
    assert ("preprocessor_config.json" in str(error.value)) == bool(preprocessor)
