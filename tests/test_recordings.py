"""Recordings: every width, rate and container; splitting; files that are damaged, hostile or none."""

from __future__ import annotations

import importlib
import os
import struct
import sys
import tracemalloc
import wave
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.runtime.errors import MediaError, UsageError
from gemma_edge.runtime.media.recordings import Segment, read_audio, split_at_pauses
from support.audio_clips import RATE, Array, odd_clips, write_wav

SPEECH = odd_clips()["speech_like"]


def samples_of(path: Path) -> Array:
    return np.concatenate([segment.samples for segment in read_audio(path)])


def refusal(path: Path) -> str:
    """The message; it must name the file."""
    with pytest.raises(MediaError) as error:
        list(read_audio(path))
    assert str(path) in str(error.value)
    return str(error.value)


# Formats. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_wav_of_integers(width: int, channels: int, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", SPEECH, width=width, channels=channels)
    got = samples_of(path)
    assert got.dtype == np.float32 and got.shape == SPEECH.shape
    np.testing.assert_allclose(got, SPEECH, atol=1.01 / 2 ** (8 * width) + 1e-6)


def test_the_ends_of_the_range(tmp_path: Path) -> None:
    extremes = np.tile(np.array([-1, 1, 0], np.float32), 400)
    for width in (1, 2, 3, 4):
        got = samples_of(write_wav(tmp_path / f"{width}.wav", extremes, width=width))
        assert got.min() == -1 and 0.99 < got.max() <= 1 and got[2] == 0


def test_channels_are_averaged(tmp_path: Path) -> None:
    stereo = np.stack([SPEECH, np.zeros_like(SPEECH)], axis=1)
    np.testing.assert_allclose(samples_of(write_wav(tmp_path / "a.wav", stereo)), SPEECH / 2, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.flac", "PCM_24", 1e-6),
        ("a.ogg", "VORBIS", 0.05),
        ("a.mp3", "MPEG_LAYER_III", 0.05),
        ("a.aiff", "PCM_16", 1e-4),
        ("float.wav", "FLOAT", 0.0),
        ("double.wav", "DOUBLE", 1e-7),
        ("a_law.wav", "ALAW", 0.02),
    ],
)
def test_what_soundfile_reads(name: str, subtype: str, tolerance: float, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    time = np.arange(2 * RATE) / RATE
    chord = sum(0.2 * np.sin(2 * np.pi * pitch * time) for pitch in (330, 550, 770)).astype(np.float32)
    soundfile.write(tmp_path / name, chord, RATE, subtype)
    got = samples_of(tmp_path / name)
    assert len(got) == len(chord)
    middle = slice(2_000, -2_000)  # a lossy codec needs a moment
    assert np.abs(got[middle] - chord[middle]).max() <= tolerance


def test_extensible_wav(tmp_path: Path) -> None:
    """WAVE_FORMAT_EXTENSIBLE, which recorders write for 24 bits: Python reads it from 3.12 on."""
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", SPEECH, RATE, "PCM_24", format="WAVEX")
    np.testing.assert_allclose(samples_of(tmp_path / "a.wav"), SPEECH, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_any_rate(rate: int, tmp_path: Path) -> None:
    """A tone keeps its pitch, its level and its length."""
    pytest.importorskip("soxr")
    seconds, pitch = 3.3, 440
    tone = (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)).astype(np.float32)
    got = samples_of(write_wav(tmp_path / "a.wav", tone, rate=rate))
    assert abs(len(got) - seconds * RATE) <= 2
    expected = 0.5 * np.sin(2 * np.pi * pitch * np.arange(len(got)) / RATE)
    assert np.abs(got - expected)[200:-200].max() < 2e-3


def test_resampling_in_blocks_is_resampling(tmp_path: Path) -> None:
    soxr = pytest.importorskip("soxr")
    noise = (0.1 * np.random.default_rng(0).standard_normal(600_000)).astype(np.float32)
    path = write_wav(tmp_path / "a.wav", noise, rate=48_000, width=4)
    np.testing.assert_allclose(samples_of(path), soxr.resample(noise, 48_000, RATE), atol=1e-5)


@pytest.mark.parametrize(("module", "name"), [("soundfile", "a.flac"), ("soxr", "48k.wav")])
def test_a_missing_extra_is_named(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.endswith(".wav"):
        write_wav(tmp_path / name, SPEECH, rate=48_000)
    else:
        (tmp_path / name).write_bytes(b"fLaC" + bytes(60))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf'{name}: .*{module}.*pip install "\.\[audio\]"'):
        read_audio(tmp_path / name)


def test_wav_at_16_khz_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("soundfile", "soxr"):
        monkeypatch.setitem(sys.modules, module, None)
    assert len(samples_of(write_wav(tmp_path / "a.wav", SPEECH))) == len(SPEECH)


# Splitting. ---------------------------------------------------------------------------------------


def blocks(samples: Array, size: int = 50_000) -> Iterator[Array]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def with_pauses(seconds: float, pauses: list[float]) -> Array:
    """Noise that is silent for 0.4 s from each of `pauses` on."""
    noise = (0.1 * np.random.default_rng(3).standard_normal(int(seconds * RATE))).astype(np.float32)
    for pause in pauses:
        noise[int(pause * RATE) : int((pause + 0.4) * RATE)] = 0
    return noise


def test_up_to_thirty_seconds_are_one_segment(tmp_path: Path) -> None:
    clip = odd_clips()["thirty_seconds"]
    (segment,) = read_audio(write_wav(tmp_path / "a.wav", clip))
    assert (segment.start, segment.end) == (0.0, 30.0) and len(segment.samples) == 480_000


def test_cuts_are_in_the_pauses() -> None:
    recording = with_pauses(100.0, [9.0, 22.0, 41.0, 46.5, 66.0, 88.0])
    segments = list(split_at_pauses(blocks(recording)))
    cuts = [segment.end for segment in segments[:-1]]
    # Of two pauses within reach, the later one; from 66.2 on the rest still is longer than 30 s.
    assert cuts == pytest.approx([22.2, 46.7, 66.2, 88.2], abs=0.15)
    np.testing.assert_array_equal(np.concatenate([s.samples for s in segments]), recording)


@pytest.mark.parametrize("seconds", [30.01, 59.9, 75.0])
@pytest.mark.parametrize("signal", ["noise", "silence", "tone"])
def test_segments_touch_and_fit(seconds: float, signal: str) -> None:
    count = int(seconds * RATE)
    time = np.arange(count) / RATE
    recording = {"noise": with_pauses(seconds, []), "silence": np.zeros(count), "tone": np.sin(2500 * time)}
    samples = recording[signal].astype(np.float32)
    segments = list(split_at_pauses(blocks(samples, 4_001)))
    assert segments[0].start == 0 and segments[-1].end == pytest.approx(count / RATE)
    for left, right in pairwise(segments):
        assert left.end == right.start
    for segment in segments:
        assert 513 <= len(segment.samples) <= 480_000
        assert segment.end - segment.start == pytest.approx(len(segment.samples) / RATE)
    assert all(len(s.samples) >= 240_000 for s in segments[:-1])
    np.testing.assert_array_equal(np.concatenate([s.samples for s in segments]), samples)


def test_the_size_of_blocks_does_not_show() -> None:
    recording = with_pauses(95.0, [20.0, 44.0, 71.0])
    ends = [[s.end for s in split_at_pauses(blocks(recording, size))] for size in (777, 100_000, 10**9)]
    assert ends[0] == ends[1] == ends[2]


def test_shorter_segments_if_wanted(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", with_pauses(20.0, []))
    segments = list(read_audio(path, max_seconds=5))
    assert len(segments) >= 4 and max(len(s.samples) for s in segments) <= 5 * RATE
    for seconds in (0, 0.99, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="max_seconds"):
            read_audio(path, max_seconds=seconds)


def test_silence_is_known() -> None:
    assert Segment(0, 1, np.zeros(RATE, np.float32)).silent
    assert Segment(0, 1, np.full(RATE, 9e-4, np.float32)).silent
    assert not Segment(0, 1, SPEECH).silent


def test_a_recording_of_three_hours_in_bounded_memory(tmp_path: Path) -> None:
    """345 MB of 16-bit samples, most of them a hole in the file."""
    path, hours = tmp_path / "long.wav", 3
    frames = hours * 3600 * RATE
    with open(path, "wb") as file:
        file.write(
            struct.pack(
                "<4sI4s4sIHHIIHH", b"RIFF", 36 + 2 * frames, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16
            )
        )
        file.write(struct.pack("<4sI", b"data", 2 * frames))
        file.truncate(44 + 2 * frames)
    tracemalloc.start()
    end = 0.0
    for segment in read_audio(path):
        assert segment.start == end and segment.silent
        end = segment.end
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert end == hours * 3600
    assert peak < 16e6


# Bad input. ---------------------------------------------------------------------------------------


def patched(path: Path, offset: int, data: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    """A WAV of 16 bits: its data chunk's length is at 40, its samples from 44 on."""
    return write_wav(tmp_path / "note.wav", SPEECH)


def test_a_wav_that_promises_more_than_it_has(wav: Path) -> None:
    patched(wav, 40, struct.pack("<I", 2 * len(SPEECH) + 2))
    assert "cut off" in refusal(wav)


def test_a_wav_that_was_cut_off(wav: Path) -> None:
    wav.write_bytes(wav.read_bytes()[:-1000])
    assert f"expected {2 * len(SPEECH)} bytes of samples, got {2 * len(SPEECH) - 1000} bytes" in refusal(wav)


def test_a_float_wav_that_lies(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "float.wav"
    soundfile.write(path, SPEECH, RATE, "FLOAT")
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cut off" in refusal(path)


def test_a_wav_that_says_it_is_empty(wav: Path) -> None:
    assert "length of 0" in refusal(patched(wav, 40, bytes(4)))


def test_a_wav_from_a_pipe_is_read_to_its_end(wav: Path) -> None:
    """ffmpeg -f wav - cannot know the length: it writes the largest."""
    patched(wav, 40, b"\xff\xff\xff\xff")
    assert len(samples_of(patched(wav, 4, b"\xff\xff\xff\xff"))) == len(SPEECH)


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (22, struct.pack("<H", 0), "channels"),
        (24, struct.pack("<I", 0), "sample rate: expected 4000 to 384000 Hz, got 0 Hz"),
        (24, struct.pack("<I", 1), "got 1 Hz"),
        (24, struct.pack("<I", 2**32 - 1), "got 4294967295 Hz"),
        (22, struct.pack("<H", 2**16 - 1), "channels: expected 1 to 64, got 65535"),
        (34, struct.pack("<H", 0), "bits per sample"),
        (34, struct.pack("<H", 64), "bits per sample"),
        (12, b"junk", "a fmt chunk"),
        (36, b"junk", "a data chunk"),
    ],
)
def test_headers_that_make_no_sense(wav: Path, offset: int, data: bytes, words: str) -> None:
    assert words in refusal(patched(wav, offset, data))


def test_every_truncation_of_a_wav_is_refused(wav: Path) -> None:
    content = wav.read_bytes()
    for length in (*range(48), 100, 1000, len(content) - 1):
        wav.write_bytes(content[:length])
        refusal(wav)


def test_headers_with_random_bytes(wav: Path) -> None:
    """Whatever the header says: segments that fit, or an error that names the file."""
    content, rng = wav.read_bytes(), np.random.default_rng(11)
    refusals: list[str] = []
    for _ in range(300):
        places = rng.integers(0, 44, rng.integers(1, 4))
        wav.write_bytes(content)
        for place in places:
            patched(wav, int(place), rng.bytes(1))
        try:
            segments = list(read_audio(wav))
        except (MediaError, UsageError) as error:
            refusals.append(str(error))
        else:
            assert 0 < sum(len(s.samples) for s in segments) <= 8 * len(content)
    assert 0 < len(refusals) < 300
    assert all(str(wav) in message for message in refusals)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    samples = SPEECH.copy()
    samples[8_000] = value
    soundfile.write(tmp_path / "a.wav", samples, RATE, "FLOAT")
    assert "NaN or infinity at 0.500 s" in refusal(tmp_path / "a.wav")


@pytest.mark.parametrize("count", [0, 1, 512])
def test_too_short(count: int, tmp_path: Path) -> None:
    refusal(write_wav(tmp_path / "a.wav", SPEECH[:count]))


def test_the_shortest(tmp_path: Path) -> None:
    assert len(samples_of(write_wav(tmp_path / "a.wav", SPEECH[:513]))) == 513


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"R",
        b"RIFF",
        b"RIFF\x00\x00\x00\x00AVI LIST",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\x00\x00\x00\x20ftypM4A " + bytes(100),
        b"hello, I am a text\n" * 10,
        b"ID3" + bytes(range(256)),
        b"fLaC" + bytes(100),
        b"OggS" + bytes(100),
        b"FORM\x00\x00\x00\x10AIFF" + bytes(4),
        b"\xff\xfb" + bytes(range(256)) * 20,
    ],
)
def test_no_recording(content: bytes, tmp_path: Path) -> None:
    if content[:4] in (b"fLaC", b"OggS", b"FORM") or content[:2] in (b"ID", b"\xff\xfb"):
        pytest.importorskip("soundfile")
    (tmp_path / "what.wav").write_bytes(content)
    refusal(tmp_path / "what.wav")


@pytest.mark.parametrize("name", ["a.flac", "a.mp3"])
def test_half_of_a_compressed_file(name: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / name, SPEECH, RATE)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    refusal(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.wav")
    assert "a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")
    assert "a pipe" in refusal(tmp_path / "pipe.wav")


def test_errors_of_headers_come_before_the_first_segment(wav: Path) -> None:
    with pytest.raises(MediaError):
        read_audio(patched(wav, 40, bytes(4)))


def test_the_file_is_closed(wav: Path) -> None:
    """Windows could not delete it otherwise, and a service would run out of descriptors."""
    opened: list[Any] = []
    original = wave.open

    def remember(file: Any, mode: str | None = None) -> Any:
        opened.append(file)
        return original(file, mode)  # type: ignore[call-overload]

    audio = importlib.import_module("gemma_edge.runtime.media.recordings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio.wave, "open", remember)
        list(read_audio(wav))
    (file,) = opened
    assert file.closed
