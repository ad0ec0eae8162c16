"""Frames and sound of videos, which are made here, and files that must be refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma_edge.runtime.errors import MediaError, UsageError
from gemma_edge.runtime.media.video import frames_within, has_sound, sample_frames, sound

av = pytest.importorskip("av")

RATE = 10  # frames a second; frame i is a grey of 20 * (second it is in)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("video") / "clip.mp4", seconds=8, tone=440.0)


def write_clip(path: Path, seconds: int, tone: float = 0.0) -> Path:
    """Grey frames, brighter by the second, and a tone if it is above 0 Hz."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=RATE)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("aac", rate=44_100, layout="mono") if tone else None
        for i in range(seconds * RATE):
            grey = np.full((48, 64, 3), 30 + 20 * (i // RATE), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(video.encode())
        if audio:
            times = np.arange(seconds * 44_100) / 44_100
            samples = (0.5 * np.sin(2 * np.pi * tone * times)).astype(np.float32)
            for start in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], "fltp", "mono")
                frame.sample_rate, frame.pts = 44_100, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def test_frames_are_spread_over_the_video(clip: Path) -> None:
    frames = list(sample_frames(clip, 32, count=4))
    assert [round(frame.seconds) for frame in frames] == [1, 3, 5, 7]
    for frame in frames:
        assert frame.pixels.shape == (3, 32, 32)
        expected = (30 + 20 * int(frame.seconds)) / 255
        assert abs(float(frame.pixels.mean()) - expected) < 0.03


def test_a_token_budget_and_a_rate_bound_the_frames(clip: Path) -> None:
    assert [frames_within(n) for n in (0, 256, 1000, 4096)] == [1, 1, 3, 16]
    assert len(list(sample_frames(clip, 8, count=100))) == 8
    assert len(list(sample_frames(clip, 8, count=100, per_second=0.5))) == 4
    assert len(list(sample_frames(clip, 8, count=1))) == 1


def test_sound_is_16_khz_mono(clip: Path) -> None:
    samples = np.concatenate(list(sound(clip)))
    assert has_sound(clip) and abs(len(samples) / 16_000 - 8) < 0.1
    spectrum = np.abs(np.fft.rfft(samples[16_000:32_000]))
    assert int(spectrum.argmax()) == 440
    assert abs(float(np.std(samples[16_000:32_000])) - 0.5 / np.sqrt(2)) < 0.02


def test_a_video_without_sound(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "silent.mp4", seconds=1)
    assert not has_sound(path) and len(list(sample_frames(path, 8, count=4))) == 1
    with pytest.raises(MediaError, match=r"silent\.mp4: streams: expected a sound track, got none"):
        next(sound(path))


def test_bad_files_are_refused_by_name(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:3000])
    for name in ("text.mp4", "cut.mp4", "missing.mp4"):
        with pytest.raises(MediaError, match=name):
            list(sample_frames(tmp_path / name, 8, count=2))
    with pytest.raises(UsageError, match="count"):
        next(sample_frames(clip, 8, count=0))


@pytest.mark.parametrize("name", ["list.m3u8", "list.ffconcat"])
def test_a_playlist_opens_no_other_file(name: str, clip: Path, tmp_path: Path) -> None:
    texts = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:8,\n{clip}\n#EXT-X-ENDLIST\n",
        "list.ffconcat": f"ffconcat version 1.0\nfile {clip}\n",
    }
    (tmp_path / name).write_text(texts[name])
    with pytest.raises(MediaError, match=name):
        list(sample_frames(tmp_path / name, 8, count=1))
