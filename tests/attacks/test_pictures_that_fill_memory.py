"""Attack: a file of some kB whose picture takes a gigabyte while it is decoded.

The files have the headers of large pictures; reading them is refused by the header, or stays below 300 MB.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("PIL")
from PIL import Image

from support.processes import limited

BOUND = 300 << 20  # the documented 256 MiB, and the interpreter's own growth
CHILD = """
import sys
from gemma_edge.runtime.errors import MediaError
from gemma_edge.runtime.media.images import load_image
load_image(sys.argv[1], 64)
def peak(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak("VmRSS")
try:
    load_image(sys.argv[2], 64)
    said = "read"
except MediaError as error:
    said = str(error)
print(peak("VmHWM") - before, said)
"""


def saved(form: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 90)).save(out, form, **options)
    return out.getvalue()


def lossless_webp(width: int, height: int) -> bytes:
    """The 14 bits of width and of height in a VP8L header changed."""
    data = bytearray(saved("WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") & ~((1 << 28) - 1)
    data[at : at + 4] = (bits | (width - 1) | (height - 1) << 14).to_bytes(4, "little")
    return bytes(data)


def png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def progressive_jpeg(width: int, height: int) -> bytes:
    data = bytearray(saved("JPEG", progressive=True, subsampling=0))
    at = data.index(b"\xff\xc2") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def run(path: Path, small: Path) -> tuple[int, str]:
    done = subprocess.run(
        [*limited(CHILD, AS=8 << 30), str(small), str(path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    peak, _, said = done.stdout.strip().partition(" ")
    return int(peak), said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/clear_refs")
@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("a.webp", lambda: lossless_webp(8000, 8000), "at most 16 megapixels"),
        ("b.webp", lambda: lossless_webp(4000, 4000), None),
        ("wide.png", lambda: png(65_535, 976), "read"),
        ("a.jpg", lambda: progressive_jpeg(8000, 8000), "at most 40 megapixels"),
        ("b.jpg", lambda: progressive_jpeg(6000, 6000), None),
    ],
)
def test_a_large_picture_in_a_small_file(
    name: str, make: Callable[[], bytes], expected: str | None, tmp_path: Path
) -> None:
    path, small = tmp_path / name, tmp_path / "small.png"
    path.write_bytes(make())
    Image.new("RGB", (64, 64)).save(small)
    peak, said = run(path, small)
    assert path.stat().st_size < 1_000_000
    assert expected is None or expected in said
    assert peak < BOUND, said
