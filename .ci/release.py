#!/usr/bin/env python3
"""Builds the wheel and the sdist so that anybody can build the same bytes again.

    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) python .ci/release.py OUT

setuptools makes the wheel reproducible by itself. Its sdist has the times and owners of the files it was made
from: the archive is packed again, sorted, with one time and no owner.
"""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

HOOKS = "import setuptools.build_meta as b; b.build_wheel({0!r}); b.build_sdist({0!r})"


def build(tree: Path, out: Path) -> list[Path]:
    """Both files, in `out`. Raises CalledProcessError with setuptools' words."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"import os; os.umask(0o022); {HOOKS.format(str(out.resolve()))}"
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "315532800")  # zip's first year
    environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    (sdist,) = out.glob("*.tar.gz")
    repack(sdist, int(epoch))
    return sorted(out.iterdir())


def repack(path: Path, epoch: int) -> None:
    """The same members, sorted, of one time and no owner."""
    with tarfile.open(path) as old:
        members = [(m, old.extractfile(m).read() if m.isfile() else b"") for m in old.getmembers()]  # type: ignore[union-attr]
    plain = path.with_suffix("")
    with tarfile.open(plain, "w", format=tarfile.PAX_FORMAT) as new:
        for member, data in sorted(members, key=lambda item: item[0].name):
            made = tarfile.TarInfo(member.name)
            made.type, made.linkname, made.size, made.mtime = member.type, member.linkname, len(data), epoch
            made.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(made, io.BytesIO(data))
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, epoch) as packed:
        packed.write(plain.read_bytes())
    plain.unlink()


if __name__ == "__main__":
    for made in build(Path(__file__).parent.parent, Path(sys.argv[1])):
        print(made)
