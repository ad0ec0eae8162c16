"""Log-mel features against transformers' feature extractor, live and through golden outputs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.families.log_mel import LogMel, log_mel
from support.audio_clips import Array, odd_clips

GOLDEN = Path(__file__).parent / "golden" / "audio.npz"
TOLERANCE = 1e-4
CLIPS = odd_clips()


@pytest.mark.parametrize("name", ["one_after_it", "tone", "last_sample_alone", "faint"])
def test_golden_features(name: str) -> None:
    with np.load(GOLDEN) as golden:
        samples = golden[f"clip.{name}"] / np.float32(32_768)
        features, mask = log_mel(samples)
        np.testing.assert_allclose(features, golden[f"features.{name}"], rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(mask, golden[f"mask.{name}"])


@pytest.fixture(scope="module")
def extractor() -> Any:
    return pytest.importorskip("transformers").Gemma3nAudioFeatureExtractor()


@pytest.mark.parametrize("name", CLIPS)
def test_twenty_odd_clips(name: str, extractor: Any) -> None:
    theirs = extractor(CLIPS[name], return_tensors="np")
    features, mask = log_mel(CLIPS[name])
    assert features.dtype == np.float32 and mask.dtype == np.bool_
    assert features.shape == theirs["input_features"][0].shape
    assert np.abs(features - theirs["input_features"][0]).max() <= TOLERANCE
    np.testing.assert_array_equal(mask, theirs["input_features_mask"][0])


@pytest.mark.parametrize(
    "changes",
    [
        {"feature_size": 40, "mel_floor": 1e-3},
        {"preemphasis": 0.0},
        {"preemphasis_htk_flavor": False},
        {"fft_overdrive": False, "input_scale_factor": 3.0},
        {"frame_length_ms": 25.0, "min_frequency": 20.0, "max_frequency": 4000.0},
        {"sampling_rate": 8_000, "hop_length_ms": 12.5, "max_frequency": 3_800.0},
        {"per_bin_mean": [0.1 * i for i in range(128)], "per_bin_stddev": [1 + 0.01 * i for i in range(128)]},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_every_field_of_the_config(changes: dict[str, Any], extractor: Any) -> None:
    samples = CLIPS["speech_like"]
    theirs = type(extractor)(**changes)(samples, return_tensors="np")["input_features"][0]
    features, _ = LogMel.from_dict(changes)(samples)
    assert features.shape == theirs.shape
    assert np.abs(features - theirs).max() <= TOLERANCE


def test_a_published_config_is_the_default() -> None:
    published = {
        "dither": 0.0,
        "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
        "feature_size": 128,
        "fft_length": 1024,
        "fft_overdrive": True,
        "frame_length": 512,
        "hop_length": 160,
        "input_scale_factor": 1.0,
        "max_frequency": 7600.0,
        "mel_floor": 1e-05,
        "min_frequency": 125.0,
        "per_bin_mean": None,
        "per_bin_stddev": None,
        "preemphasis": 0.97,
        "preemphasis_htk_flavor": True,
        "sampling_rate": 16000,
    }
    mine = LogMel.from_dict(published)
    assert mine == LogMel() == LogMel.from_dict(json.loads(json.dumps(asdict(mine))))
    assert (mine.frame_length, mine.hop_length, mine.fft_length) == (512, 160, 1024)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feature_size", 0),
        ("feature_size", "128"),
        ("mel_floor", -1),
        ("preemphasis", float("nan")),
        ("fft_overdrive", 1),
        ("per_bin_mean", [0.0]),
        ("per_bin_stddev", 1.0),
        ("dither", 1e-4),
    ],
)
def test_a_field_that_is_wrong_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        LogMel.from_dict({field: value}, "model/preprocessor_config.json")
    assert error.value.field == field and "model/preprocessor_config.json" in str(error.value)


@pytest.mark.parametrize("count", [0, 1, 512])
def test_too_short_for_a_frame(count: int) -> None:
    with pytest.raises(ValueError, match="513 samples or more"):
        log_mel(np.zeros(count, np.float32))


def test_the_number_of_frames_is_known_beforehand() -> None:
    extractor = LogMel()
    for count in (513, 640, 641, 1_000, 16_000, 480_000):
        assert len(extractor(np.zeros(count, np.float32))[0]) == extractor.frames(count)
    assert extractor.frames(512) == 0 and extractor.frames(480_000) == 2997


def test_blocks_of_frames_do_not_show() -> None:
    """A frame is the same wherever it lies in the clip, also across the blocks that bound memory."""
    samples: Array = CLIPS["thirty_seconds"]
    whole, _ = log_mel(samples)
    for frame in (511, 512, 1023, 1024):
        alone, _ = log_mel(samples[160 * frame : 160 * frame + 640])
        np.testing.assert_allclose(alone[0], whole[frame], atol=1e-5)
