"""Where the files of this repository are, for the tests that read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("runtime", "export", "devices", "benchmarks", "cli")
FOLDERS = (*PACKAGES, "pocket", "android_demo", "docs", "tests")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for top in FOLDERS for path in (ROOT / top).rglob("*.md"))])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(document: Path, *languages: str) -> Iterator[str]:
    """The blocks of code of a document in one of these languages; "" is a block without one."""
    return (code for language, code in _BLOCK.findall(read(document)) if language in languages)


def prose(document: Path) -> str:
    """A document without its blocks of code."""
    return _BLOCK.sub("", read(document))
