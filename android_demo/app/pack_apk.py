"""Packs an APK: the same contents give the same bytes, and libraries lie at multiples of 16 KiB.

    pack_apk.py OUT RESOURCES.apk CLASSES.dex LIBRARY...

Debian 12's zipalign knows pages of 4 KiB only. Android maps libraries from the APK, so these and
resources.arsc are stored, not compressed; the extra field 0xd935 tells apksigner to keep their place.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from pathlib import Path

PAGE = 16_384
ALIGNMENT_FIELD = 0xD935
TIME = (1981, 1, 1, 1, 1, 2)


def add(archive: zipfile.ZipFile, name: str, data: bytes, alignment: int = 0) -> None:
    """Adds an entry, stored at a multiple of `alignment` or else deflated."""
    entry = zipfile.ZipInfo(name, TIME)
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_STORED if alignment else zipfile.ZIP_DEFLATED
    if alignment:
        begin = archive.start_dir + 30 + len(name.encode()) + 6
        padding = bytes(-begin % alignment)
        entry.extra = struct.pack("<HHH", ALIGNMENT_FIELD, 2 + len(padding), alignment) + padding
    archive.writestr(entry, data)


def pack(out: Path, resources: Path, dex: Path, libraries: list[Path]) -> None:
    with zipfile.ZipFile(resources) as made, zipfile.ZipFile(out, "w", compresslevel=9) as archive:
        for name in sorted(made.namelist()):
            add(archive, name, made.read(name), 4 if name == "resources.arsc" else 0)
        add(archive, "classes.dex", dex.read_bytes())
        for library in sorted(libraries):
            add(archive, f"lib/arm64-v8a/{library.name}", library.read_bytes(), PAGE)


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
