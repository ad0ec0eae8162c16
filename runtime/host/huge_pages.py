"""Huge pages for weights that an engine packs into memory of its own, as ONNX Runtime does.

A step of decoding reads all weights once. With pages of 4 KiB the processor looks up the place of each, and
its prefetching ends with each; with pages of 2 MiB E2B decodes faster (docs/speed.md, "Huge pages"). Many
systems give huge pages to those who ask. glibc's heap asks if a variable says so as the process starts.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from gemma_edge.runtime.artifacts.onnx_files import DECODER_DATA

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
GLIBC = (2, 35)  # the first that knows it
WORTHWHILE = 256 << 20  # bytes of weights; processors find smaller ones in their caches, or nearly so


def restart_with_huge_pages(words: Iterable[str]) -> None:
    """Starts this process's program anew, with huge pages, if that makes it faster; else does nothing.

    The process keeps its id, arguments and files. Nothing happens where the variable is set already, where
    the system gives everybody huge pages or nobody, or without glibc 2.35.

    Args:
        words: of the command line; one of them may be a bundle whose weights are large.
    """
    tunables = os.environ.get(VARIABLE, "")
    if TUNABLE in tunables or not sys.executable or not _asked_for():
        return
    if any(_weights(word) >= WORTHWHILE for word in words):
        variables = os.environ | {VARIABLE: ":".join(filter(None, (tunables, f"{TUNABLE}=1")))}
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)


def _asked_for() -> bool:
    """Whether the system has huge pages for those who ask, and glibc can."""
    try:
        setting = SETTING.read_text(encoding="ascii")
        libc = re.fullmatch(r"glibc (\d+)\.(\d+)", os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (OSError, ValueError):  # no Linux, no glibc
        return False
    return "[madvise]" in setting and libc is not None and (int(libc[1]), int(libc[2])) >= GLIBC


def _weights(word: str) -> int:
    """Bytes of weights, if the word is a bundle for ONNX Runtime."""
    try:
        return os.stat(os.path.join(word, DECODER_DATA)).st_size
    except (OSError, ValueError):  # ValueError: a null byte
        return 0
