"""`EncodedFiles`: the rows of encoded attachments as files in the cache folder, for the next process.

A file's name says what it is of: the bundle, its engine, the CPU and our version, then the content that the
encoder was given. So another bundle, another image size and another picture miss. A file that is damaged is a
miss too, and is removed. Only its owner may read it: rows tell what a picture shows.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import FileError
from gemma_edge.runtime.files.cache_folder import cache_folder
from gemma_edge.runtime.files.kept_files import keep_cheap
from gemma_edge.runtime.files.sealed_arrays import read_sealed, write_sealed
from gemma_edge.runtime.media.attachments import Attachment

SUFFIX = ".encoded"
KIND = "encoded attachment"
ROWS = "rows"


@dataclass(frozen=True)
class EncodedFiles:
    """See the module.

    Args:
        of: the SHA-256 that names everything but the content.
        limit: bytes that encoded attachments of all bundles take at most.
    """

    of: str
    limit: int

    def find(self, item: Attachment, columns: int) -> NDArray[np.float32] | None:
        """The rows of an attachment, f32 (soft_tokens, columns); None where no whole file has them."""
        path = cache_folder() / self._name(item)
        if not path.exists():
            return None
        try:
            header, arrays = read_sealed(path)
            if header.get("kind") != KIND or header.get("of") != f"{self.of} {item.key}":
                raise FileError(path, "of", "this attachment", "another")
            rows = arrays.get(ROWS)
            if rows is None or rows.dtype != np.float32 or rows.shape != (item.soft_tokens, columns):
                raise FileError(path, ROWS, f"float32 ({item.soft_tokens}, {columns})", "others")
        except (FileError, OSError, MemoryError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return rows

    def store(self, item: Attachment, rows: NDArray[np.float32]) -> None:
        """Writes the rows of an attachment, if there is room for them."""
        header = {"kind": KIND, "of": f"{self.of} {item.key}"}

        def make(path: Path) -> None:
            write_sealed(path, header, {ROWS: rows})

        keep_cheap(self._name(item), self.limit, rows.nbytes + 4096, make)

    def _name(self, item: Attachment) -> str:
        return f"{self.of[:32]}-{item.key:032x}{SUFFIX}"
