"""Recognizes, checks and reads pictures, recordings and videos for a prompt.

    reader = Reader(bundle.modalities, context=bundle.context)
    parts = reader.file("clip.mp4")  # frames with their times, then what was said

Everything is read, within the limits of `images`, `audio` and `video`, before any encoder is loaded: a
damaged file costs no time. What is kept of an attachment is what its encoder takes: the pixels of one image
as bytes, or 30 s of samples, each below 2 MB for published checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.modalities import AudioModality, VisionModality
from gemma_edge.runtime.errors import BundleError, MediaError, UsageError, printable
from gemma_edge.runtime.install_hint import install_hint
from gemma_edge.runtime.media.attached_values import (
    DOWNLOAD,
    FOREIGN_TYPES,
    as_file,
    is_url,
    own_part,
    read_url,
)
from gemma_edge.runtime.media.images import load_image, pixels, upright
from gemma_edge.runtime.media.recordings import (
    MAX_SECONDS,
    Segment,
    decoded_segments,
    read_audio,
    split_at_pauses,
)
from gemma_edge.runtime.media.srt import clock
from gemma_edge.runtime.media.video import frames_within, has_pictures, has_sound, sample_frames, sound

if TYPE_CHECKING:
    from gemma_edge.runtime.artifacts.modalities import Modality

FileKind = Literal["image", "audio", "video"]

VIDEO_TOKENS = 2048  # soft tokens of a video unless told, if the context has twice as many: 8 images
MODALITY = {"image": "vision", "audio": "audio"}  # kind of an attachment: the bundle's name for its encoder
EXPORTS = {"image": "text,image", "audio": "text,audio"}
# Types of a message's parts that `Reader.part` reads.
PART_TYPES = (*MODALITY, "video", *FOREIGN_TYPES)


@dataclass(frozen=True)
class Attachment:
    """One image, or one clip of at most 30 s, ready for its encoder.

    Attributes:
        kind: "image" or "audio".
        name: what messages call it.
        soft_tokens: how many stand for it in a prompt.
        data: an image's bytes, u8 (3, size, size); a clip's samples, f32 (n,) at 16 kHz.
    """

    kind: Literal["image", "audio"]
    name: str
    soft_tokens: int
    data: NDArray[Any]

    @cached_property
    def key(self) -> int:
        """Equal for equal content, whatever the file is called."""
        digest = hashlib.sha256(self.kind.encode())
        digest.update(np.ascontiguousarray(self.data).data)
        return int.from_bytes(digest.digest()[:16], "little")


Part = str | Attachment  # of a message's content, in order
# What `Reader.value` takes; a Pillow image too, which no annotation here can name.
Attachable = str | Path | bytes | bytearray | memoryview | Attachment | NDArray[Any] | Mapping[str, Any]


def kind_of(path: str | Path) -> FileKind:
    """What a file holds, by its first bytes; its name does not matter. M4A counts as "video".

    Raises:
        MediaError: there is no such file, or it is none of these.
        UsageError: it is a URL.
    """
    if is_url(path):
        raise UsageError(f"{path}: {DOWNLOAD}")
    path = Path(path)
    try:
        if not path.is_file():
            got = "a folder" if path.is_dir() else "no regular file" if path.exists() else "no such file"
            raise MediaError(path, "file", "an image, a recording or a video", got)
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise MediaError(path, "file", "a readable file", error.strerror) from None
    if kind := _kind(head):
        return kind
    got = "an empty file" if not head else f"data starting {repr(head[:8])[1:]}"
    raise MediaError(path, "file", "an image, a recording or a video", got, "Convert it first.")


def _kind(head: bytes) -> FileKind | None:
    brand = head[8:12]
    if head[:4] in (b"RIFF", b"RF64"):
        riff: dict[bytes, FileKind] = {b"WEBP": "image", b"WAVE": "audio", b"AVI ": "video"}
        return riff.get(brand)
    if head[4:8] == b"ftyp":
        # HEIC too: Pillow does not read it, and says so better than FFmpeg.
        images = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis")
        return "image" if brand in images else "video"
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")):
        return "image"
    if head[:1] == b"P" and head[1:2] in b"123456f" and head[2:3].isspace():
        return "image"
    if head.startswith(b"OggS"):
        return "video" if b"theora" in head else "audio"
    if head.startswith((b"fLaC", b"ID3")) or (head[:4] == b"FORM" and brand in (b"AIFF", b"AIFC")):
        return "audio"
    # Matroska and WebM, FLV, ASF, MPEG program and transport streams, QuickTime without a brand.
    if head.startswith((b"\x1a\x45\xdf\xa3", b"FLV\x01", b"\x30\x26\xb2\x75", b"\x00\x00\x01\xba")):
        return "video"
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free") or (head[:1] == b"G" and head[188:189] == b"G"):
        return "video"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2:
        return "audio"
    return None


class Reader:
    """Reads attachments for the encoders of one bundle.

    Args:
        modalities: the bundle's; empty if it reads text alone.
        context: tokens that a prompt may have: a recording that takes more is not read to its end.
        bundle: named in errors.
        video_tokens: soft tokens that the frames and the sound of a video may take together.
        note: is told what is left out of a video.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        context: int,
        bundle: str | Path = "bundle",
        video_tokens: int | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        if video_tokens is not None and video_tokens < 1:
            raise UsageError(f"video_tokens must be 1 or more, not {video_tokens}")
        self.modalities, self.context, self.bundle, self.note = modalities, context, Path(bundle), note
        self.video_tokens = video_tokens or min(VIDEO_TOKENS, max(1, context // 2))

    def file(self, path: str | Path) -> list[Part]:
        """The parts of a file of any kind.

        Raises:
            MediaError: the file is missing, damaged, too large, or none of the three.
            BundleError: the bundle has no encoder for it.
            UsageError: a package is missing, or the recording is longer than the context.
        """
        kind = kind_of(path)
        if kind == "video":
            return self._video(Path(path))
        return list(self._images(path) if kind == "image" else self._audio(path))

    def attached(self, attach: Attachable | Sequence[Attachable] | None) -> list[Part]:
        """The parts of everything that is attached to a prompt: of one `value`, or of several in a list.

        Raises:
            As `value`.
        """
        if attach is None:
            return []
        if not isinstance(attach, list | tuple):
            return self.value(attach, "attach")
        return [part for n, item in enumerate(attach) for part in self.value(item, f"attach[{n}]")]

    def value(self, value: Attachable | Any, where: str) -> list[Part]:
        """The parts of a path, a file: or data: URL, a file's bytes, a Pillow image, u8 (height, width, 3),
        f32 (n,) at 16 kHz, an `Attachment`, or a part of a message.

        Raises:
            UsageError: it is none of these. Otherwise as `file`.
        """
        if isinstance(value, Attachment):
            return [value]
        if isinstance(value, Mapping):
            return self.part(value, where)
        if is_url(value):
            value = read_url(str(value), where)
        if isinstance(value, str | Path):
            return self.file(value)
        if isinstance(value, bytes | bytearray | memoryview):
            return self._data(value, where, self.file)
        if isinstance(value, np.ndarray) and value.ndim == 1:
            return list(self._audio_value(value, where))
        if isinstance(value, np.ndarray) or type(value).__module__.startswith("PIL."):
            return [self._image_value(value, where)]
        raise UsageError(
            f"{where} must be a path, a data URL, bytes, a Pillow image, u8 (height, width, 3), f32 (n,) at "
            f"16 kHz or a part of a message, not {type(value).__name__}"
        )

    def part(self, part: Mapping[str, Any], where: str = "part") -> list[Part]:
        """The parts of a message's part of type "image", "audio" or "video", as `transformers` has them, or
        "image_url" or "input_audio", as OpenAI's API has them.

        The source of the former is "path", "url" (of a file, or data:), or a value under the type's own name:
        a path, a file's bytes, an `Attachment`, for an image a Pillow image or u8 (height, width, 3), for
        audio f32 (n,) at 16 kHz.

        Raises:
            UsageError: there is no such source, or it is of another type. Otherwise as `file`.
        """
        part = own_part(part, where)
        kind = part.get("type")
        if kind not in PART_TYPES:
            raise UsageError(f"{where} must be of type {', '.join(PART_TYPES)}, not {kind!r}")
        given = {key: part[key] for key in ("path", "url", kind) if part.get(key) is not None}
        if len(given) != 1:
            raise UsageError(
                f"{where} of type {kind!r} needs one of 'path', 'url' and {kind!r}, has {list(given)}"
            )
        ((key, source),) = given.items()
        if isinstance(source, Attachment) and source.kind == kind:
            return [source]
        if key == "url" or is_url(source):
            source = read_url(str(source), where)
        if isinstance(source, str | Path):
            return self._read(kind, Path(source))
        if isinstance(source, bytes | bytearray | memoryview):
            return self._data(source, where, lambda path: self._read(kind, path))
        if key == "image":
            return [self._image_value(source, where)]
        if key == "audio":
            return list(self._audio_value(source, where))
        raise UsageError(f"{where}[{key!r}] must be a path, not {type(source).__name__}")

    def _read(self, kind: str, path: Path) -> list[Part]:
        if kind == "video":
            return self._video(path)
        return list(self._images(path) if kind == "image" else self._audio(path))

    def _data(
        self, data: bytes | bytearray | memoryview, where: str, read: Callable[[Path], list[Part]]
    ) -> list[Part]:
        """The parts of a file's bytes, called `where`."""
        with as_file(data, where) as path:
            parts = read(path)
        return [part if isinstance(part, str) else replace(part, name=where) for part in parts]

    # Images. ------------------------------------------------------------------------------------------

    def _vision(self) -> VisionModality:
        found = self.modalities.get("vision")
        return found if isinstance(found, VisionModality) else self._lacks("image")

    def _image(self, name: str, values: NDArray[np.float32]) -> Attachment:
        data = np.rint(values * np.float32(255)).astype(np.uint8)
        return Attachment("image", name, self._vision().soft_tokens, data)

    def _images(self, path: str | Path) -> Iterable[Attachment]:
        config = self._vision().config
        values = load_image(path, config.image_size, config.resample)  # type: ignore[arg-type]
        return [self._image(str(path), values)]

    def _image_value(self, value: Any, where: str) -> Attachment:
        config = self._vision().config
        try:
            from PIL import Image
        except ImportError:
            raise UsageError(f"{where}: images need pillow: {install_hint('images')}") from None
        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
            try:
                value = Image.fromarray(value)
            except (TypeError, ValueError):
                raise UsageError(f"{where}: an image is (height, width, 3), not {value.shape}") from None
        if not isinstance(value, Image.Image):
            raise UsageError(
                f"{where}['image'] must be a path, a Pillow image or u8 (height, width, 3), "
                f"not {type(value).__name__}"
            )
        if 0 in value.size:
            raise UsageError(f"{where}: a picture without pixels")
        try:
            values = pixels(upright(value), config.image_size, config.resample)  # type: ignore[arg-type]
        except Exception as error:  # it is closed, or its file is damaged
            raise UsageError(f"{where}: a picture that cannot be read: {error}") from None
        return self._image(where, values)

    def again(self, kind: str, name: str, data: NDArray[Any]) -> Attachment:
        """The attachment of data that this reader made earlier.

        Raises:
            UsageError: it made no such data.
            BundleError: the bundle has no encoder for it.
        """
        if kind == "image":
            size = self._vision().config.image_size
            if data.dtype == np.uint8 and data.shape == (3, size, size):
                return Attachment("image", name, self._vision().soft_tokens, data)
        elif kind == "audio" and data.dtype == np.float32 and data.ndim == 1:
            most = self.clip_seconds() * self._hearing().log_mel.sampling_rate
            if 0 < data.size <= most and np.isfinite(data).all():
                return self.clip(name, data)
        raise UsageError(f"{printable(name)}: no {printable(kind)} has data of {data.dtype} {data.shape}")

    # Audio. -------------------------------------------------------------------------------------------

    def segments(self, path: str | Path) -> Iterable[Segment]:
        """A recording of any length, or a video's sound, cut at pauses into clips for the encoder."""
        seconds = self.clip_seconds()
        if kind_of(path) == "video":
            return decoded_segments(path, sound(path), max_seconds=seconds)
        return read_audio(path, max_seconds=seconds)

    def clip(self, name: str, samples: NDArray[np.float32]) -> Attachment:
        """Samples of one segment as an attachment."""
        return Attachment("audio", name, self._hearing().soft_tokens, samples)

    def _hearing(self) -> AudioModality:
        found = self.modalities.get("audio")
        return found if isinstance(found, AudioModality) else self._lacks("audio")

    def clip_seconds(self) -> float:
        """The longest clip that the encoder takes, in seconds."""
        audio = self._hearing()
        longest = audio.config.max_frames * audio.log_mel.hop_length / audio.log_mel.sampling_rate
        return max(1.0, min(MAX_SECONDS, longest))

    def _audio(self, path: str | Path) -> list[Attachment]:
        return self._clips(str(path), self.segments(path))

    def _clips(self, name: str, segments: Iterable[Segment]) -> list[Attachment]:
        clips: list[Attachment] = []
        for segment in segments:
            if (len(clips) + 1) * self._hearing().soft_tokens > self.context:
                raise UsageError(
                    f"{name}: the first {clock(segment.end)} take more tokens than the context of "
                    f"{self.context}. `gemma-edge transcribe` takes recordings of any length; or load the "
                    "bundle with a larger context (--context)."
                )
            clips.append(self.clip(name, segment.samples))
        return clips

    def _audio_value(self, value: Any, where: str) -> list[Attachment]:
        shortest = self._hearing().log_mel.shortest
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind != "f":
            got = type(value).__name__
            raise UsageError(f"{where}['audio'] must be a path or f32 (n,) at 16 kHz, not {got}")
        if len(value) < shortest or not np.isfinite(value).all():
            raise UsageError(f"{where}['audio'] must have {shortest} samples or more, all of them finite")
        return self._clips(where, split_at_pauses([value.astype(np.float32)], self.clip_seconds()))

    # Videos. ------------------------------------------------------------------------------------------

    def _video(self, path: Path) -> list[Part]:
        pictures, heard = has_pictures(path), has_sound(path)
        if not pictures:
            return list(self._audio(path))
        sees, hears = "vision" in self.modalities, "audio" in self.modalities
        if not sees and not (hears and heard):
            self._lacks("image")
        parts: list[Part] = []
        spoken: list[Attachment] = []
        if heard and hears:
            tokens = self.video_tokens // 2 if sees else self.video_tokens
            spoken = self._beginning(path, max(1, tokens // self._hearing().soft_tokens))
        elif heard:
            self.note(f"{path}: its sound is left out: the bundle has no audio encoder")
        if sees:
            config, per_image = self._vision().config, self._vision().soft_tokens
            count = frames_within(self.video_tokens - sum(clip.soft_tokens for clip in spoken), per_image)
            for frame in sample_frames(
                path,
                config.image_size,
                count=count,
                resample=config.resample,  # type: ignore[arg-type]
            ):
                parts += [clock(frame.seconds), self._image(str(path), frame.pixels)]
        else:
            self.note(f"{path}: its pictures are left out: the bundle has no image encoder")
        return [*parts, *spoken]

    def _beginning(self, path: Path, room: int) -> list[Attachment]:
        """The sound of a video, no more of it than `room` clips."""
        clips: list[Attachment] = []
        for segment in self.segments(path):
            if len(clips) == room:
                self.note(f"{path}: its sound after {clock(segment.start)} is left out (--video-tokens)")
                break
            clips.append(self.clip(str(path), segment.samples))
        return clips

    def _lacks(self, kind: Literal["image", "audio"]) -> Any:
        got = "one for text" + "".join(f" and {name}" for name in self.modalities)
        raise BundleError(
            self.bundle,
            "modalities",
            f"a bundle with an encoder of {MODALITY[kind]}",
            got,
            f"Export the checkpoint with `--modalities {EXPORTS[kind]}`.",
        )
