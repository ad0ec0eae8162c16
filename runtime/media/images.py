"""Photographs in, pixels for the image encoder out: what transformers' SigLIP processor makes of them.

    pixels = load_image("photo.jpg", 768)  # f32 (3, 768, 768) in [0, 1]

The picture is turned as its EXIF orientation says, laid on white where it is transparent, and resized to a
square with Pillow's antialiased filter, whatever its proportions, as the reference does; nothing is
normalized. One thing differs from the reference: 16-bit greys are scaled to 8 bits, where Pillow's conversion
would clip nearly all of them to white. Pillow comes with the extra `images`.

Limits are checked on the header, before anything is decoded. Memory is at most some 256 MB: `PIXELS` says how
many pixels of a format that allows. A large JPEG is decoded at a half, a quarter or an eighth of its size, no
less than twice the result's; a large picture is turned after it was resized.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import MediaError, UsageError
from gemma_edge.runtime.install_hint import install_hint
from gemma_edge.runtime.units import format_size

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

Resample = Literal["bilinear", "bicubic"]

MAX_PIXELS = 64_000_000  # more than any phone's sensor but the largest; 256 MB decoded
# Fewer where a decoder holds more than the picture: two or three copies, or a whole picture's coefficients.
PIXELS = {"WEBP": 16_000_000, "AVIF": 16_000_000, "TIFF": 30_000_000, "progressive JPEG": 40_000_000}
LARGE = 16_000_000  # pixels from which memory goes before the reference's last bit
MAX_SIDE = 65_535  # JPEG's own
MAX_BYTES = 256 << 20
STRIP_PIXELS = 1 << 20
# Pillow reads many more formats. These are what cameras, phones and browsers write, and none runs a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
ORIENTATION = 0x0112  # EXIF tag
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L")


def load_image(path: str | Path, size: int, resample: Resample = "bilinear") -> NDArray[np.float32]:
    """The pixels of a picture file; of an animation, those of its first frame.

    Args:
        path: JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF.
        size: height and width of the result.
        resample: "bilinear" or "bicubic", as the checkpoint's preprocessor_config.json says.

    Returns:
        (3, size, size), red, green and blue in [0, 1].

    Raises:
        MediaError: missing, damaged, cut off, too large, or not a picture; the message names the file.
        UsageError: Pillow is not installed.
    """
    path = Path(path)
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UsageError(f"{path}: reading images needs pillow: {install_hint('images')}") from None
    with _opened(path) as file, _reported(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check_size(path, image)
                large = image.width * image.height > LARGE
                if large:
                    image.draft("RGB", (2 * size, 2 * size))  # of JPEG; others do not know it
                image.load()
                if not large:
                    return pixels(upright(image), size, resample)
                return _floats(upright(_square(image, size, resample), image.getexif()))
        except Image.DecompressionBombError:
            raise _too_large(path, "more than Pillow opens") from None
        except UnidentifiedImageError:
            names = ", ".join(FORMATS)
            raise MediaError(path, "file", f"a picture ({names})", "something else") from None


def pixels(image: Image, size: int, resample: Resample = "bilinear") -> NDArray[np.float32]:
    """The same of a Pillow image, of any mode, as it is: it is not turned and no limit is checked."""
    return _floats(_square(image, size, resample))


def _floats(square: Image) -> NDArray[np.float32]:
    array = np.asarray(square)
    return np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32) * np.float32(1 / 255)


def _square(image: Image, size: int, resample: Resample) -> Image:
    """(size, size) in RGB."""
    from PIL import Image as pillow

    filters = {"bilinear": pillow.Resampling.BILINEAR, "bicubic": pillow.Resampling.BICUBIC}
    narrow = pillow.new("RGB", (size, image.height))
    # Pillow resizes rows first, then columns: row by row its first pass needs no more than a strip.
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = rgb(image.crop((0, top, image.width, bottom)))
        narrow.paste(strip.resize((size, bottom - top), filters[resample]), (0, top))
    return narrow.resize((size, size), filters[resample])


def rgb(image: Image) -> Image:
    """In RGB, what is transparent on white."""
    from PIL import Image as pillow

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        return pillow.alpha_composite(white, image).convert("RGB")
    if image.mode in SIXTEEN_BITS:
        image = pillow.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, after its size has been checked."""
    try:
        if not path.is_file():
            got = "a folder" if path.is_dir() else "no such file" if not path.exists() else "no regular file"
            raise MediaError(path, "file", "a picture", got)
        length = path.stat().st_size
        if not 0 < length <= MAX_BYTES:
            raise MediaError(path, "size", f"at most {format_size(MAX_BYTES)}", format_size(length))
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise MediaError(path, "file", "a readable picture", error.strerror or str(error)) from None


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Errors of the decoder, by the name of the file."""
    try:
        yield
    except (MediaError, UsageError):
        raise
    except MemoryError:
        raise MediaError(path, "size", "a picture that fits the memory", "one that does not") from None
    except Exception as error:  # Pillow's decoders raise what they please: SyntaxError, struct.error, ...
        raise MediaError(
            path, "data", "a whole picture", str(error) or type(error).__name__, "The file is damaged."
        ) from None


def _check_size(path: Path, image: Image) -> None:
    width, height = image.size
    kind = "progressive JPEG" if image.info.get("progressive") else str(image.format)
    most = PIXELS.get(kind, MAX_PIXELS)
    if width * height > most or max(image.size) > MAX_SIDE:
        raise _too_large(path, f"{width} x {height}", most)


def _too_large(path: Path, got: str, most: int = MAX_PIXELS) -> MediaError:
    expected = f"at most {most // 1_000_000} megapixels and {MAX_SIDE} a side"
    return MediaError(path, "size", expected, got, "Scale it down first.")


def upright(image: Image, exif: Exif | None = None) -> Image:
    """Turned as EXIF says, its own unless told; an orientation that cannot be read turns nothing.

    `ImageOps.exif_transpose` would copy a picture that needs no turn, which may have 256 MB.
    """
    from PIL import Image as pillow

    turn = pillow.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    try:
        orientation = (image.getexif() if exif is None else exif).get(ORIENTATION, 1)
    except Exception:  # metadata that is damaged is no reason to refuse the picture
        return image
    if orientation not in turns:
        return image
    return image.transpose(turns[orientation])
