"""Frames and sound of videos, which are made here, and files that must be refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma_edge.runtime.errors import MediaError, UsageError
from gemma_edge.runtime.media.video import frames_within, has_sound, sample_frames, sound
from support.video_clips import write_clip

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("video") / "clip.mp4", seconds=8, tone=440.0)


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


def write_sounds(path: Path, layouts: list[str]) -> Path:
    """A second of silence in each layout, one after another in a single stream of an MPEG-TS."""
    with path.open("wb") as file:
        for layout in layouts:
            part = path.with_name(f"{layout}.ts")
            with av.open(str(part), "w") as container:
                stream = container.add_stream("mp2", rate=44_100, layout=layout)
                channels = 1 if layout == "mono" else 2
                for _ in range(40):
                    frame = av.AudioFrame.from_ndarray(
                        np.zeros((1, 1152 * channels), np.int16), "s16", layout
                    )
                    frame.sample_rate = 44_100
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
            file.write(part.read_bytes())
    return path


def test_sound_whose_layout_changes_is_refused(tmp_path: Path) -> None:
    same = write_sounds(tmp_path / "same.ts", ["mono", "mono"])
    assert sum(map(len, sound(same))) > 1.9 * 16_000
    changing = write_sounds(tmp_path / "changing.ts", ["mono", "stereo"])
    with pytest.raises(MediaError, match=r"changing\.ts: sound track: expected one layout, format and rate"):
        list(sound(changing))


def test_codecs_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "clip.mkv", seconds=1, tone=440.0).read_bytes()
    for codec, other, read in (
        (b"V_MPEG4/ISO/ASP", b"V_NOBODY/KNOWS/", lambda path: list(sample_frames(path, 8, count=1))),
        (b"A_AAC", b"A_NEW", lambda path: list(sound(path))),
    ):
        assert data.count(codec) == 1
        path = tmp_path / f"{other[:5].decode()}.mkv"
        path.write_bytes(data.replace(codec, other))
        with pytest.raises(MediaError, match="expected a codec that FFmpeg knows"):
            read(path)


def test_tags_that_are_not_utf_8_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "tagged.mkv"
    write_clip(tmp_path / "clip.mkv", seconds=1)
    with av.open(str(tmp_path / "clip.mkv")) as source, av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLETITLE"
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    data = path.read_bytes()
    assert data.count(b"TITLETITLE") >= 1
    path.write_bytes(data.replace(b"TITLETITLE", b"\xff\xfeTLETITLE"))
    assert len(list(sample_frames(path, 8, count=1))) == 1
