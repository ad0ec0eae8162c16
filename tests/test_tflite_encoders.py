"""The encoders as .tflite: the same rows as the reference, on LiteRT, and only from files that are sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.random_gemma3n_audio import VARIANTS, Array, AudioSource, audio_config, first, random_features
from support.random_gemma3n_audio import random_source as random_audio
from support.random_gemma3n_vision import TowerSource, random_pixels, random_tower, small_config

pytest.importorskip("ai_edge_litert")

from gemma_edge.export.emit.reference.encoder_weights import FoldedWeights
from gemma_edge.export.emit.reference.reference_audio import evaluate_audio
from gemma_edge.export.emit.reference.reference_vision import evaluate_vision
from gemma_edge.export.emit.tflite.tflite_audio import audio_lengths, emit_audio
from gemma_edge.export.emit.tflite.tflite_file import TfliteFile
from gemma_edge.export.emit.tflite.tflite_vision import emit_vision
from gemma_edge.export.formats.litertlm.litertlm_sections import emit_audio_adapter, emit_end_row, emit_row
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.export.publish import HashingFile
from gemma_edge.export.weights.recipe import load_recipe
from gemma_edge.export.weights.rounding import NearestRounding
from gemma_edge.runtime.artifacts.tflite_check import check_audio, check_vision
from gemma_edge.runtime.artifacts.tflite_reader import read_tflite
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.media.audio_encoder import AudioEncoder
from gemma_edge.runtime.media.image_encoder import VisionEncoder

VISION = {
    "64": small_config(),
    "192_pooled": small_config(192, grid=4),
    "64_wider": small_config(64, grid=2, multiplier=0.0625),
}
BAR = 1e-3  # of the largest value


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packed weights go."""
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "packed"))
    return tmp_path / "packed"


def write(file: TfliteFile, source: WeightSource, path: Path) -> Path:
    out = HashingFile(path)
    file.write(out, source, NearestRounding("none"))
    out.close()
    return path


def write_vision(config: VisionConfig, source: TowerSource, folder: Path, recipe: str = "fp32") -> Path:
    return write(emit_vision(config, load_recipe(recipe)), source, folder / "vision.tflite")


def write_audio(
    config: AudioConfig, source: AudioSource, folder: Path, recipe: str = "fp32", name: str = "audio.tflite"
) -> Path:
    return write(emit_audio(config, load_recipe(recipe)), FoldedWeights(source, config), folder / name)


def relative(got: Array, expected: Array) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# Against the reference. ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION)
def test_an_image_s_rows_are_the_reference_s(name: str, tmp_path: Path) -> None:
    config = VISION[name]
    source, pixels = random_tower(config), random_pixels(config.image_size)
    with VisionEncoder(write_vision(config, source, tmp_path), threads=1) as encoder:
        assert (encoder.image_size, encoder.soft_tokens) == (config.image_size, config.soft_tokens)
        encoder.encode(random_pixels(config.image_size, seed=3))  # leaves nothing behind
        assert relative(encoder.encode(pixels), evaluate_vision(source, config, pixels)) < BAR


@pytest.mark.parametrize("name", VARIANTS)
def test_a_clip_s_rows_are_the_reference_s(name: str, tmp_path: Path) -> None:
    """At every length, shorter and longer than each signature, masked and not."""
    config = audio_config(**VARIANTS[name])
    source = random_audio(config)
    lengths = audio_lengths(config)
    assert lengths[-1] == config.max_frames
    with AudioEncoder(write_audio(config, source, tmp_path), threads=1) as encoder:
        assert (encoder.max_frames, encoder.soft_tokens) == (config.max_frames, config.soft_tokens)
        for frames in sorted({1, 17, *lengths, *(n - 1 for n in lengths)}, reverse=True):
            frames = min(frames, config.max_frames)
            features, mask = random_features(config, frames), first(max(1, frames * 2 // 3), frames)
            expected = evaluate_audio(source, config, features, mask)
            assert relative(encoder.encode(features, mask), expected) < BAR
            assert relative(encoder.encode(features), evaluate_audio(source, config, features)) < BAR


def test_quantized_layers_stay_near_and_are_small(tmp_path: Path) -> None:
    """Random weights, 16 times narrower than published, amplify what is rounded."""
    config = VISION["64_wider"]
    source, pixels = random_tower(config), random_pixels(64)
    path = write_vision(config, source, tmp_path, "int8")
    with VisionEncoder(path, threads=1) as encoder:
        got = encoder.encode(pixels)
    expected = evaluate_vision(source, config, pixels)
    assert 1e-4 < float(np.linalg.norm(got - expected) / np.linalg.norm(expected)) < 0.05
    assert path.stat().st_size < 0.4 * sum(4 * array.size for array in source.weights.values())
    audio = audio_config(hidden_size=128, input_feat_size=32)
    clip, features = random_audio(audio), random_features(audio, 150)
    wanted = evaluate_audio(clip, audio, features)
    with AudioEncoder(write_audio(audio, clip, tmp_path, "int8"), threads=1) as heard:
        rows = heard.encode(features)
    cosine = (rows * wanted).sum(axis=1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(wanted, axis=1)
    assert 0.99 < cosine.min() < 1 - 1e-7


def test_signatures_share_their_weights(tmp_path: Path) -> None:
    config = audio_config()
    one = emit_audio(config, load_recipe("int8"), lengths=[config.max_frames])
    several = emit_audio(config, load_recipe("int8"))
    assert list(read_tflite(write_audio(config, random_audio(config), tmp_path)).signatures) == [
        f"audio_{frames}" for frames in audio_lengths(config)
    ]
    assert several.size == one.size


def test_what_litert_lm_calls_adapters(tmp_path: Path) -> None:
    """An image's rows, and the end's below; a clip's, and zeros where it is over; the end of a clip alone."""
    from ai_edge_litert.interpreter import Interpreter

    end = np.arange(8, dtype=np.float32)
    rows = np.random.default_rng(0).standard_normal((1, 5, 8), dtype=np.float32)
    mask = np.array([[True, True, True, False, False]])

    def run(file: TfliteFile, **inputs: Any) -> Any:
        path = write(file, random_tower(VISION["64"]), tmp_path / f"{file.graphs[0].name}.tflite")
        (signature,) = read_tflite(path).signatures
        (got,) = Interpreter(str(path)).get_signature_runner(signature)(**inputs).values()
        return got

    below = np.concatenate([rows, end.reshape(1, 1, 8)], axis=1)
    np.testing.assert_array_equal(run(emit_end_row(5, end), features=rows), below)
    kept = run(emit_audio_adapter(5, 8), features=rows, mask=mask)
    np.testing.assert_array_equal(kept, rows * mask[:, :, None])
    np.testing.assert_array_equal(run(emit_row(end)), end.reshape(1, 1, 8))


def test_weights_are_packed_once(tmp_path: Path, cache: Path) -> None:
    config = VISION["64"]
    path = write_vision(config, random_tower(config), tmp_path, "int8")
    VisionEncoder(path, threads=1).close()
    (packed,) = cache.glob("*.xnnpack")
    before = packed.stat().st_mtime_ns
    with VisionEncoder(path, threads=1) as encoder:
        encoder.encode(random_pixels(64))
    assert [f.stat().st_mtime_ns for f in cache.glob("*.xnnpack")] == [before]


# What is not an encoder. --------------------------------------------------------------------------


def test_the_encoders_check_what_they_are_given(tmp_path: Path) -> None:
    seen = VisionEncoder(write_vision(VISION["64"], random_tower(VISION["64"]), tmp_path), threads=1)
    with pytest.raises(ValueError, match="pixels must be"):
        seen.encode(np.zeros((3, 32, 64), np.float32))
    config = audio_config()
    heard = AudioEncoder(write_audio(config, random_audio(config), tmp_path), threads=1)
    with pytest.raises(UsageError, match="1 to 192 frames"):
        heard.encode(random_features(config, 193))
    for encoder, argument in ((seen, random_pixels(64)), (heard, random_features(config, 5))):
        encoder.close()
        encoder.close()
        with pytest.raises(ValueError, match="closed"):
            encoder.encode(argument)  # type: ignore[attr-defined]


def test_files_that_are_no_such_encoder(tmp_path: Path) -> None:
    vision = write_vision(VISION["64"], random_tower(VISION["64"]), tmp_path)
    audio = write_audio(audio_config(), random_audio(audio_config()), tmp_path)
    for path, make in ((audio, VisionEncoder), (vision, AudioEncoder)):
        with pytest.raises(BundleError, match="signatures"):
            make(path)
    for make in (VisionEncoder, AudioEncoder):
        with pytest.raises(BundleError, match=r"missing\.tflite"):
            make(tmp_path / "missing.tflite")
        (tmp_path / "junk.tflite").write_bytes(b"junk" * 10)
        with pytest.raises(BundleError, match=r"junk\.tflite"):
            make(tmp_path / "junk.tflite")


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def renamed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"features", b"fixtures"))


def other_size(path: Path) -> None:
    """Says images are 96 x 96; the operators' shapes are what they were."""
    data = path.read_bytes()
    shape = np.array([4, 1, 64, 64, 3], "<i4").tobytes()
    assert shape in data
    path.write_bytes(data.replace(shape, np.array([4, 1, 96, 64, 3], "<i4").tobytes()))


@pytest.mark.parametrize("damage", [truncated, renamed, other_size])
def test_a_damaged_file_is_refused_before_the_engine_sees_it(
    damage: Callable[[Path], None], tmp_path: Path, cache: Path
) -> None:
    path = write_vision(VISION["64"], random_tower(VISION["64"]), tmp_path)
    damage(path)
    with pytest.raises(BundleError, match=r"vision\.tflite"):
        VisionEncoder(path)
    assert not cache.exists()  # nothing was packed


@settings(max_examples=100, deadline=None)
@given(bit=st.integers(0, 8 * 24_000 - 1))
def test_a_flipped_bit_is_refused_or_leaves_the_shapes(
    bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    config, path = audio_config(), folder / "flipped.tflite"
    whole = folder / "whole.tflite"
    if not whole.exists():
        write_audio(config, random_audio(config), folder, name="whole.tflite")
    data = bytearray(whole.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
        graph = check_audio(read_tflite(path))
    except BundleError:
        return
    sound = check_audio(read_tflite(whole))
    assert set(graph.frames) <= set(sound.frames)  # a list of signatures may have become shorter
    assert replace(graph, frames=()) == replace(sound, frames=())


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    vision = check_vision(read_tflite(write_vision(VISION["64"], random_tower(VISION["64"]), tmp_path)))
    assert (vision.size, vision.soft_tokens, vision.hidden) == (64, 16, 32)
    config = audio_config()
    audio = check_audio(read_tflite(write_audio(config, random_audio(config), tmp_path)))
    assert (audio.bins, audio.soft_tokens, audio.frames) == (16, config.soft_tokens, (32, 96, 192))
