"""English prose: Jane Austen's novels, as Debian's package r-cran-janeaustenr ships them.

The novels are in the public domain; the package is under the MIT licence. What is held out are chapters, one
in ten: training never sees a line of them.
"""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples import held_out

PACKAGE = "r-cran-janeaustenr"
TABLE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
CHAPTER = re.compile(r"^(?:CHAPTER|Chapter) \w+\.?$")
VOLUME = re.compile(r"^(?:VOLUME|Volume) \w+$")
LAST = re.compile(r"^(?:THE END|FINIS|End of .*|Finis)\.?$", re.IGNORECASE)
STRINGS, STRING = 16, 9  # types in R's serialization


@dataclass(frozen=True)
class Chapter:
    """A chapter, numbered from 1 through its book; paragraphs are lines, with an empty line between them."""

    book: str
    number: int
    text: str

    @property
    def held_out(self) -> bool:
        return held_out("chapter", self.book, self.number)


def chapters(folder: Path) -> list[Chapter]:
    """All chapters; the package is fetched into `folder` if it is not there."""
    return [
        Chapter(book, number, text)
        for book, lines in sorted(_books(_table(folder).read_bytes()))
        for number, text in enumerate(_chapters(lines), 1)
    ]


def _table(folder: Path) -> Path:
    table = folder / "austen" / TABLE
    if not table.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True)
        (package,) = folder.glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg", "-x", package, folder / "austen"], check=True)
    return table


def _books(table: bytes) -> Iterator[tuple[str, list[str]]]:
    """Titles and lines of an R database, whose entries are a length and zlib's stream each."""
    at = 0
    while at < len(table):
        stream = zlib.decompressobj()
        lines = _strings(stream.decompress(table[at + 4 :]))
        at = len(table) - len(stream.unused_data)
        yield lines[0].title(), lines


def _strings(serialized: bytes) -> list[str]:
    """The first vector of strings in R's XDR serialization."""
    at = serialized.index(struct.pack(">I", STRINGS))
    (count,) = struct.unpack_from(">I", serialized, at + 4)
    at += 8
    found = []
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", serialized, at)
        if flags & 0xFF != STRING:
            raise ValueError(f"byte {at}: type {flags & 0xFF} where a string should be")
        found.append(serialized[at + 8 : at + 8 + max(length, 0)].decode())
        at += 8 + max(length, 0)
    return found


def _chapters(lines: list[str]) -> Iterator[str]:
    """Texts between headings; what comes before the first one is left out, and the marks of italics are."""
    text: list[str] | None = None
    for line in (*(line.strip() for line in lines), "CHAPTER END"):
        if CHAPTER.match(line):
            if text is not None:
                paragraphs = "\n".join(text).strip().split("\n\n")
                yield "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip())
            text = []
        elif text is not None and not VOLUME.match(line) and not LAST.match(line):
            text.append(line.replace("_", ""))
