"""Files to and from a device, by what is in them.

A file goes into `NAME.part`, is continued there after an interruption when what is there is a beginning of
it, and gets its name when the device has computed the same SHA-256. What was verified is noted with size and
time of change, so that the next push reads neither side's gigabytes again on the device.

    ROOT/files/KEY/NAME      what was pushed; KEY follows from the path here, so two folders "out" stay apart
    ROOT/files/KEY.pushed    lines "SHA256 SIZE MTIME PATH" of what was verified
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gemma_edge.benchmarks.devices.base import Progress
from gemma_edge.benchmarks.devices.shell import ShellDevice
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_size

HASH_BYTES_S = 20e6  # the slowest that a device is expected to hash


@dataclass(frozen=True)
class _File:
    source: Path
    name: str  # below ROOT/files/KEY, with "/"
    size: int
    sha256: str


def push(device: ShellDevice, source: Path, progress: Progress | None = None) -> str:
    """Brings a file or folder to a device; see `Device.push`.

    Raises:
        UsageError: no such file or folder here.
        DeviceError: the device is gone, or full.
    """
    source = source.absolute()
    files = list(_files(source))
    key = hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
    folder = f"{device.root}/files/{key}"
    there, extra = _there(device, folder)
    missing = [file for file in files if there.get(file.name) != (file.sha256, file.size)]
    unwanted = extra - {name for file in files for name in (file.name, f"{file.name}.part")}
    for name in sorted(unwanted):
        device.sh(f"rm -f {shlex.quote(f'{folder}/{name}')}")
    total, done = sum(file.size for file in files), 0
    done = total - sum(file.size for file in missing)
    _check_room(device, folder, missing)
    for file in missing:
        done = _push_file(device, folder, file, done, total, progress)
    if progress is not None:
        progress(total, total)
    return f"{folder}/{source.name}"


def _files(source: Path) -> Iterator[_File]:
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.is_file())
    elif source.is_file():
        paths = [source]
    else:
        raise UsageError(f"{source}: no such file or folder")
    for path in paths:
        name = path.relative_to(source.parent).as_posix()
        if "\n" in name:
            raise UsageError(f"{path}: a name with a line break cannot be sent")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        yield _File(path, name, path.stat().st_size, digest)


def _there(device: ShellDevice, folder: str) -> tuple[dict[str, tuple[str, int]], set[str]]:
    """What is there, verified and unchanged, as {name: (sha256, size)}; and the names of all files."""
    quoted = shlex.quote(folder)
    said = device.sh(
        f"mkdir -p {quoted} && cd {quoted} && cat {quoted}.pushed 2>/dev/null; echo '###'\n"
        "find . -type f -exec stat -c '%s %Y %n' {} +"
    )
    noted, _, found = said.partition("###\n")
    verified = {}
    for line in noted.splitlines():
        fields = line.split(" ", 3)
        if len(fields) == 4:
            verified[fields[3]] = (fields[0], fields[1], fields[2])
    present: dict[str, tuple[str, int]] = {}
    names = set()
    for line in found.splitlines():
        size, mtime, path = line.split(" ", 2)
        name = posixpath.normpath(path)
        names.add(name)
        note = verified.get(name)
        if note and note[1:] == (size, mtime):
            present[name] = (note[0], int(size))
    return present, names


def _check_room(device: ShellDevice, folder: str, missing: list[_File]) -> None:
    if not missing:
        return
    quoted = [shlex.quote(f"{folder}/{file.name}{end}") for file in missing for end in ("", ".part")]
    # Blocks that the old versions take are free once these are replaced; whole kilobytes.
    said = device.sh(
        f"cd {shlex.quote(folder)} && df -Pk . | tail -n 1\nstat -c %s {' '.join(quoted)} 2>/dev/null\nexit 0"
    )
    first, *sizes = said.splitlines()
    try:
        free = int(first.split()[3]) * 1024
    except (IndexError, ValueError):
        return  # then the write itself tells
    need = sum(file.size for file in missing) - sum(int(size) for size in sizes if size.isdigit())
    if need > free:
        raise device.no_space(f"{format_size(need)} to send, {format_size(free)} free")


def _push_file(
    device: ShellDevice, folder: str, file: _File, done: int, total: int, progress: Progress | None
) -> int:
    """Sends one file; returns the bytes that are there then."""
    target = f"{folder}/{file.name}"
    part, quoted = shlex.quote(f"{target}.part"), shlex.quote(target)
    patience = 30 + file.size / HASH_BYTES_S
    start = _resumable(device, part, file, patience)
    done += start
    if progress is not None:
        progress(done, total)

    def sent(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    # Made anew unless it is continued; the old file goes first, its room may be needed.
    parent = shlex.quote(posixpath.dirname(target))
    fresh = "" if start else f"&& : >{part}"
    device.sh(f"mkdir -p {parent} && rm -f {quoted} {fresh}")
    with file.source.open("rb") as stream:
        stream.seek(start)
        answer = device.send(f"cat >>{part}", stream, sent)
    if answer.exit_code:
        # A part that does not fit only stands in the way of everybody else.
        device.sh(f"rm -f {part}")
        device.expect(answer)
    got = device.sh(f"sha256sum {part}", timeout=patience).split()[0].lstrip("\\")
    if got != file.sha256:
        device.sh(f"rm -f {part}")
        raise device.error(f"{file.name} arrived changed: SHA-256 {got} instead of {file.sha256}")
    note = f"{file.sha256} $(stat -c '%s %Y' {quoted})"
    name = shlex.quote(f" {file.name}")
    device.sh(f'mv {part} {quoted} && printf "%s%s\\n" "{note}" {name} >>{shlex.quote(folder)}.pushed')
    return done


def _resumable(device: ShellDevice, part: str, file: _File, patience: float) -> int:
    """Bytes of a part that is there already and is a beginning of the file."""
    said = device.sh(
        f"[ ! -f {part} ] || {{ stat -c %s {part} && sha256sum {part}; }}", timeout=patience
    ).split()
    if len(said) < 2 or not 0 < int(said[0]) <= file.size:
        return 0
    with file.source.open("rb") as stream:
        return int(said[0]) if _prefix_sha256(stream, int(said[0])) == said[1].lstrip("\\") else 0


def _prefix_sha256(stream: IO[bytes], size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (piece := stream.read(min(size, 1 << 20))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def pull(device: ShellDevice, path: str, target: Path) -> None:
    """Brings a file from a device; see `Device.pull`.

    Raises:
        DeviceError: there is no such file, it arrived changed, or the device is gone.
    """
    expected = device.sh(f"sha256sum {shlex.quote(path)}", timeout=300).split()[0].lstrip("\\")
    part = target.with_name(f"{target.name}.part")
    try:
        with part.open("w+b") as file:
            device.expect(device.receive(f"cat {shlex.quote(path)}", file))
            file.seek(0)
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != expected:
            raise device.error(f"{path} arrived changed: SHA-256 {got} instead of {expected}")
        os.replace(part, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
