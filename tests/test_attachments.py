"""Files that go into a prompt: what they are, what is made of them, and what is refused."""

from __future__ import annotations

import base64
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from gemma_edge.runtime.errors import BundleError, MediaError, UsageError
from gemma_edge.runtime.media import attachments
from gemma_edge.runtime.media.attachments import Attachment, Part, Reader, kind_of
from gemma_edge.runtime.media.images import load_image
from support.audio_clips import write_wav
from support.stub_modalities import AUDIO_TOKENS, IMAGE_SIZE, IMAGE_TOKENS, modalities

IDS = {name: index for index, name in enumerate(("boi", "boa", "eoi", "image", "eoa", "audio"), 10)}
EVERY = modalities(IDS)
NOISE = np.random.default_rng(0).uniform(-0.3, 0.3, 16_000).astype(np.float32)


def reader(*kinds: str, context: int = 4096, **options: object) -> Reader:
    chosen = {kind: EVERY[kind] for kind in kinds or EVERY}
    return Reader(chosen, context=context, bundle="out", **options)  # type: ignore[arg-type]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pil = pytest.importorskip("PIL.Image")
    rows = np.linspace(0, 255, 48 * 30 * 3).reshape(30, 48, 3).astype(np.uint8)
    pil.fromarray(rows).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return write_wav(tmp_path / "note.wav", NOISE)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    pytest.importorskip("PIL")
    from support.video_clips import write_clip

    return write_clip(tmp_path_factory.mktemp("video") / "clip.mp4", seconds=8, tone=440.0)


# What a file is. ----------------------------------------------------------------------------------

HEADS = {
    "image": [
        b"\xff\xd8\xff\xe0\0\x10JFIF",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM\x10\0\0\0",
        b"II*\0",
        b"MM\0*",
        b"P6\n1 1\n255\n",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"\0\0\0\x20ftypavif",
        b"\0\0\0\x18ftypheic",
    ],
    "audio": [
        b"RIFF\x10\0\0\0WAVEfmt ",
        b"RF64\xff\xff\xff\xffWAVE",
        b"fLaC\0\0\0\x22",
        b"OggS\0\x02" + bytes(22) + b"\x01vorbis",
        b"ID3\x04",
        b"\xff\xfb\x90\x64",
        b"FORM\0\0\0\x10AIFF",
    ],
    "video": [
        b"\0\0\0\x20ftypisom",
        b"\0\0\0\x20ftypM4A ",
        b"\0\0\0\x14ftypqt  ",
        b"\x1a\x45\xdf\xa3",
        b"RIFF\x10\0\0\0AVI LIST",
        b"FLV\x01\x05",
        b"OggS\0\x02" + bytes(22) + b"\x80theora",
        b"\x47" + bytes(187) + b"\x47",
        b"\0\0\x01\xba",
    ],
}


@pytest.mark.parametrize(("kind", "head"), [(kind, head) for kind, heads in HEADS.items() for head in heads])
def test_the_content_decides_what_a_file_is(kind: str, head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "misnamed.txt"
    path.write_bytes(head)
    assert kind_of(path) == kind


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "an empty file"),
        (b"hello, this is text", "data starting"),
        (b"%PDF-1.7", "data starting"),
        (b"RIFF\x10\0\0\0sfbk", "data starting"),
        (b"\0" * 600, "data starting"),
        (b"P5x", "data starting"),
    ],
)
def test_a_file_that_is_none_of_these(content: bytes, got: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=rf"photo.jpg: .*{got}"):
        reader().file(path)


def test_no_file_at_all(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    for path, got in ((tmp_path / "absent.png", "no such"), (tmp_path, "a folder"), (long, "too long")):
        with pytest.raises(MediaError, match=got) as error:
            reader().file(path)
        assert str(path) in str(error.value) and error.value.exit_code == 3


# Images and recordings. ---------------------------------------------------------------------------


def test_an_image_is_kept_as_the_bytes_that_its_pixels_are(photo: Path) -> None:
    (item,) = reader().file(photo)
    assert isinstance(item, Attachment) and (item.kind, item.soft_tokens) == ("image", IMAGE_TOKENS)
    assert item.data.dtype == np.uint8 and item.data.nbytes == 3 * IMAGE_SIZE**2
    np.testing.assert_array_equal(item.data * np.float32(1 / 255), load_image(photo, IMAGE_SIZE))


def test_equal_content_has_an_equal_key(photo: Path, note: Path, tmp_path: Path) -> None:
    def key(path: Path) -> int:
        (item,) = reader().file(path)
        assert isinstance(item, Attachment)
        return item.key

    assert key(photo) == key(Path(shutil.copy(photo, tmp_path / "copy")))
    assert key(note) != key(write_wav(tmp_path / "other.wav", NOISE[::-1]))


def test_a_part_names_its_file_in_any_of_the_ways_of_transformers(photo: Path, note: Path) -> None:
    (expected,) = reader().file(photo)
    assert isinstance(expected, Attachment)
    for source in ({"path": str(photo)}, {"path": photo}, {"url": photo.as_uri()}, {"image": str(photo)}):
        (item,) = reader().part({"type": "image", **source})
        assert isinstance(item, Attachment) and item.key == expected.key
    assert reader().part({"type": "image", "image": expected}) == [expected]
    (clip,) = reader().part({"type": "audio", "url": note.as_uri()})
    assert isinstance(clip, Attachment) and len(clip.data) == len(NOISE)


def test_a_recording_in_the_place_of_an_image_is_refused(note: Path) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(MediaError, match=r"note.wav: .*a picture"):
        reader().part({"type": "image", "path": note})


def test_a_long_recording_becomes_clips_for_the_encoder(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "long.wav", np.tile(NOISE, 70))
    items = reader().file(path)
    assert len(items) == 3 and all(isinstance(item, Attachment) for item in items)
    assert sum(len(item.data) for item in items if isinstance(item, Attachment)) == 70 * 16_000


def test_a_recording_beyond_the_context_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "lecture.wav", np.tile(NOISE, 200))
    with pytest.raises(UsageError, match=r"lecture.wav: the first 1:\d\d take more tokens .* transcribe"):
        reader(context=2 * AUDIO_TOKENS).file(path)


@pytest.mark.parametrize(
    ("has", "lacks", "expected"),
    [((), "photo", "vision"), (("audio",), "photo", "vision"), (("vision",), "note", "audio")],
)
def test_a_bundle_without_the_encoder_says_how_to_get_one(
    has: tuple[str, ...], lacks: str, expected: str, photo: Path, note: Path
) -> None:
    only = Reader({kind: EVERY[kind] for kind in has}, context=64, bundle="out")
    with pytest.raises(BundleError, match=rf"^out: .*an encoder of {expected}.*--modalities text"):
        only.file(photo if lacks == "photo" else note)


def test_a_damaged_image_is_refused_when_it_is_read(photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:200])
    with pytest.raises(MediaError, match=r"photo.jpg"):
        reader().file(photo)


def test_a_wav_that_lies_is_refused(note: Path) -> None:
    data = bytearray(note.read_bytes())
    data[40:44] = struct.pack("<I", 10**9)
    note.write_bytes(data)
    with pytest.raises(MediaError, match=r"note.wav: data chunk"):
        reader().file(note)


# Videos. ------------------------------------------------------------------------------------------


def test_a_video_is_frames_with_their_times_then_its_sound(clip: Path) -> None:
    parts = reader(video_tokens=AUDIO_TOKENS * 2).file(clip)
    assert [part for part in parts if isinstance(part, str)] == [f"0:0{second}" for second in range(8)]
    kinds = [part.kind for part in parts if isinstance(part, Attachment)]
    assert kinds == ["image"] * 8 + ["audio"]
    assert isinstance(parts[0], str) and isinstance(parts[1], Attachment) and parts[1].kind == "image"


def test_a_videos_frames_fit_the_budget_beside_its_sound(clip: Path) -> None:
    parts = reader(video_tokens=AUDIO_TOKENS + 3 * IMAGE_TOKENS).file(clip)
    taken = sum(part.soft_tokens for part in parts if isinstance(part, Attachment))
    assert taken == AUDIO_TOKENS + 3 * IMAGE_TOKENS


def test_what_a_bundle_cannot_take_of_a_video_is_left_out_and_told(clip: Path) -> None:
    notes: list[str] = []
    for kind, rest in (("vision", "image"), ("audio", "audio")):
        parts = reader(kind, note=notes.append).file(clip)
        assert {part.kind for part in parts if isinstance(part, Attachment)} == {rest}
    assert ["its sound" in notes[0], "its pictures" in notes[1]] == [True, True]
    with pytest.raises(BundleError, match="encoder of vision"):
        Reader({}, context=64).file(clip)


def test_sound_beyond_the_budget_is_left_out_and_told(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "MAX_SECONDS", 2.0)
    notes: list[str] = []
    parts = reader(video_tokens=4 * AUDIO_TOKENS, note=notes.append).file(clip)
    assert sum(part.kind == "audio" for part in parts if isinstance(part, Attachment)) == 2
    assert len(notes) == 1 and "its sound after 0:0" in notes[0]


def test_a_recording_in_a_videos_container_is_a_recording(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "memo.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        for start in range(0, 16_000, 1024):
            frame = av.AudioFrame.from_ndarray(NOISE[None, start : start + 1024], "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (item,) = reader().file(path)
    assert isinstance(item, Attachment) and item.kind == "audio"
    assert abs(len(item.data) - 16_000) < 3_000
    (segment,) = reader().segments(path)
    assert segment.end == len(item.data) / 16_000


def test_a_budget_below_one_token_is_refused() -> None:
    with pytest.raises(UsageError, match="video_tokens must be 1 or more"):
        reader(video_tokens=0)
    assert reader(context=1000).video_tokens == 500
    assert reader(context=32_768).video_tokens == attachments.VIDEO_TOKENS


# What is attached need not be a file. -------------------------------------------------------------


def keys(parts: list[Part]) -> list[int]:
    return [part.key for part in parts if isinstance(part, Attachment)]


def data_url(path: Path) -> str:
    return f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_a_picture_may_be_given_in_every_way(photo: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    url, data = data_url(photo), photo.read_bytes()
    with pil.open(photo) as image:
        ways = [
            str(photo),
            photo,
            photo.as_uri(),
            url,
            data,
            bytearray(data),
            memoryview(data),
            image,
            np.asarray(image),
            {"type": "image", "path": str(photo)},
            {"type": "image", "url": url},
            {"type": "image", "image": data},
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "image_url", "image_url": url},
        ]
        expected = keys(reader().file(photo))
        for way in ways:
            assert keys(reader().attached(way)) == expected, way  # type: ignore[arg-type]
            assert keys(reader().attached([way, way])) == 2 * expected, way  # type: ignore[list-item]
    assert reader().attached(None) == reader().attached([]) == []


def test_a_recording_may_be_given_in_every_way(note: Path) -> None:
    expected = keys(reader().file(note))
    encoded = base64.b64encode(note.read_bytes()).decode()
    samples = reader().file(note)[0].data  # type: ignore[union-attr]
    for way in (
        note,
        note.read_bytes(),
        samples,
        {"type": "audio", "audio": note.read_bytes()},
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
    ):
        assert keys(reader().attached(way)) == expected, way  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "attach must be a path, a data URL, bytes, .*, not int"),
        ([7], r"attach\[0\] must be"),
        ([["photo.jpg"]], r"attach\[0\] must be .*, not list"),
        (object(), "not object"),
        (iter(["photo.jpg"]), "not list_iterator"),
        ({"type": "text", "text": "hi"}, "must be of type image, audio, video, image_url, input_audio"),
        ({"type": ["image"]}, "must be of type"),
        ({}, "must be of type"),
        (np.zeros((0, 4, 3), np.uint8), "attach: "),
        (np.zeros((4, 4, 3)), "u8"),
        (np.zeros(8_000, np.int16), "f32"),
        ("https://example.org/a.png", "only files are read: download it first"),
        ("ftp://example.org/a.png", "download it first"),
    ],
    ids=str,
)
def test_what_cannot_be_attached_is_named(value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reader().attached(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [b"", b"nothing that is known"])
def test_bytes_that_are_no_picture_are_named_by_their_place(data: bytes) -> None:
    with pytest.raises(MediaError, match=r"^attach\[1\]: file: expected an image"):
        reader().attached([NOISE, data])


def test_a_url_is_no_missing_file() -> None:
    with pytest.raises(UsageError, match=r"^https://example.org/a.png: only files are read"):
        kind_of("https://example.org/a.png")
