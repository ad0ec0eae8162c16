"""Pixels as transformers' processor makes them, and pictures that must be refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_edge.runtime.errors import MediaError
from gemma_edge.runtime.media.images import MAX_PIXELS, load_image, pixels

pytest.importorskip("PIL")

from PIL import Image, ImageFile, ImageOps

from support.pictures import painting, pictures

GOLDEN = Path(__file__).parent / "golden" / "pictures.npz"
NEAR = 1 / 255 + 1e-6
PICTURES = dict(pictures())


@pytest.fixture(scope="module")
def golden() -> dict[str, NDArray[np.uint8]]:
    """What transformers' processor made of `pictures()`, 40 x 40, as bytes."""
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_are_transformers_pixels(name: str, golden: dict[str, NDArray[np.uint8]]) -> None:
    got = pixels(PICTURES[name], 40)
    assert got.shape == (3, 40, 40) and got.dtype == np.float32
    assert np.abs(got - golden[name] / 255).max() <= NEAR


def processors() -> list[Any]:
    """Those of transformers that are installed: with torchvision, and with Pillow alone."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = []
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    found.append(SiglipImageProcessorPil)
    try:
        import torchvision  # noqa: F401
        from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

        found.append(SiglipImageProcessor)
    except (ImportError, RuntimeError):  # RuntimeError: it does not belong to this torch
        pass
    size = {"height": 96, "width": 96}
    return [made(do_normalize=False, resample=2, size=size) for made in found]


def test_pixels_are_those_of_the_installed_processors(tmp_path: Path) -> None:
    photo = Image.fromarray(painting(800, 600, seed=4))
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo.save(tmp_path / f"{orientation}.jpg", exif=exif, quality=90)
    files = {path.name: ImageOps.exif_transpose(Image.open(path)) for path in tmp_path.iterdir()}
    for processor in processors():
        for image in PICTURES.values():
            expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
            assert np.abs(pixels(image, 96) - expected).max() <= NEAR
        for name, image in files.items():
            expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
            assert np.abs(load_image(tmp_path / name, 96) - expected).max() <= NEAR


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(painting(60, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    assert np.array_equal(load_image(tmp_path / "turned.png", 32), pixels(expected, 32))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    smooth = Image.fromarray(painting(64, 64) // 8 + np.arange(64, dtype=np.uint8)[:, None, None] * 3)
    smooth.save(tmp_path / f"picture.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    got = load_image(tmp_path / f"picture.{suffix}", 16)
    assert np.abs(got - pixels(smooth, 16)).max() < (0.1 if suffix in ("jpg", "gif") else 1e-6)


def test_of_an_animation_the_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    got = load_image(tmp_path / "moving.gif", 8)
    assert np.allclose(got, np.array([1, 0, 0]).reshape(3, 1, 1))


def test_sixteen_bit_greys_are_scaled(tmp_path: Path) -> None:
    greys = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(greys).save(tmp_path / "scan.png")
    assert np.abs(load_image(tmp_path / "scan.png", 8)[0] - greys / 65535).max() < 1 / 255


def test_a_wide_picture(tmp_path: Path) -> None:
    image = Image.fromarray(np.tile(painting(300, 20), (1, 100, 1)))
    image.save(tmp_path / "wide.png")
    assert image.width == 30_000
    assert np.abs(load_image(tmp_path / "wide.png", 64) - pixels(image, 64)).max() == 0


# What must be refused. ----------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(painting(200, 100)).save(file, "JPEG")
    return file.getvalue()


BAD = {
    "bomb": (png_header(60_000, 60_000), "megapixels"),
    "just_too_large": (png_header(MAX_PIXELS // 8000 + 1, 8000), "megapixels"),
    "too_wide": (png_header(70_000, 1), "a side"),
    "claims_more_than_it_holds": (png_header(1000, 1000), "damaged"),
    "truncated_jpeg": (jpeg()[:2000], "damaged"),
    "header_only": (jpeg()[:20], "expected a"),
    "text": (b"This is no picture at all.\n" * 20, "expected a picture"),
    "empty": (b"", "size"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "expected a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    data, part = BAD[name]
    path = tmp_path / f"{name}.png"
    path.write_bytes(data)
    with pytest.raises(MediaError, match=part) as error:
        load_image(path, 768)
    assert str(path) in str(error.value) and error.value.exit_code == 3


@pytest.mark.parametrize("name", ["bomb", "just_too_large", "too_wide"])
def test_sizes_are_checked_before_decoding(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    (tmp_path / "large.png").write_bytes(BAD[name][0])
    with pytest.raises(MediaError, match="size"):
        load_image(tmp_path / "large.png", 768)
    (tmp_path / "whole.png").write_bytes(png_header(10, 10))
    with pytest.raises(MediaError, match="decoded"):  # what is not too large does get there
        load_image(tmp_path / "whole.png", 768)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        load_image(tmp_path / "none.jpg", 64)
    with pytest.raises(MediaError, match="a folder"):
        load_image(tmp_path, 64)
