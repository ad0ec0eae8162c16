"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gemma_edge.runtime.files.abandoned import remove_abandoned


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden sibling to write to; it is synced and takes the place of `path` when the block ends well.

    An error, a full disk too, removes the sibling and leaves `path` as it was; a kill leaves the sibling,
    which the next writer of `path` removes. A link is followed. A pipe or a device, such as /dev/stdout, is
    written to directly. Missing parent folders are made.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    before = f".{target.stem}.partial-"
    remove_abandoned(target.parent, before, target.suffix)
    # The same suffix: it tells a browser the format.
    sibling = target.with_name(f"{before}{os.getpid()}{target.suffix}")
    try:
        yield sibling
        with sibling.open("rb") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, sibling)
        os.replace(sibling, target)
    finally:
        sibling.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text through `replacing`."""
    with replacing(path) as sibling:
        sibling.write_text(text, encoding="utf-8")
