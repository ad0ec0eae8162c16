"""Copies files to and from a device, by content.

A file is sent to `NAME.part` and renamed when the device has computed the same SHA-256. A part that is a
beginning of the file is continued after an interruption. Verified files are noted with their size and time of
change, so the next push need not hash them again on the device.

    ROOT/files/KEY/NAME      pushed files; KEY follows from the path here, so two folders "out" stay apart
    ROOT/files/KEY.pushed    lines "SHA256 SIZE MTIME PATH" of verified files
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

from gemma_edge.devices.base import Progress
from gemma_edge.devices.shell import ShellDevice
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.manifest import MANIFEST
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.file_digest import remembered_sha256
from gemma_edge.runtime.units import format_size

HASH_BYTES_S = 20e6  # the slowest that a device is expected to hash


@dataclass(frozen=True)
class _File:
    source: Path
    name: str  # below ROOT/files/KEY, with "/"
    size: int
    sha256: str


class FileDevice(ShellDevice):
    """A device that receives files over its shell."""

    def push(self, source: Path, *, progress: Progress | None = None) -> str:
        return push(self, source, progress)

    def pull(self, path: str, target: Path) -> None:
        pull(self, path, target)

    def remove_pushed(self, path: str) -> None:
        """Removes what `push` returned the path of."""
        folder = shlex.quote(posixpath.dirname(path))
        self.answer(f"rm -rf {folder} {folder}.pushed", timeout=60)

    def free_bytes(self) -> int | None:
        """Where pushed files go, now; None where nobody tells."""
        said = self.sh(f"df -Pk {shlex.quote(self.root)} | tail -n 1").split()
        return int(said[3]) * 1024 if len(said) > 3 and said[3].isdigit() else None


def push(
    device: FileDevice, source: Path, progress: Progress | None = None, folder: str | None = None
) -> str:
    """Copies a file or folder to a device; see `Device.push`.

    Args:
        folder: there, instead of one whose name follows from the path here.

    Raises:
        UsageError: no such file or folder here.
        DeviceError: the device is gone, or full.
    """
    source = source.absolute()
    files = list(_files(source))
    key = hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
    folder = folder or f"{device.root}/files/{key}"
    there, sizes = _there(device, folder)
    missing = [file for file in files if there.get(file.name) != file.sha256]
    unwanted = sizes.keys() - {name for file in files for name in (file.name, f"{file.name}.part")}
    if unwanted:
        device.sh(f"rm -f {' '.join(shlex.quote(f'{folder}/{name}') for name in sorted(unwanted))}")
    total = sum(file.size for file in files)
    done = total - sum(file.size for file in missing)
    _check_room(device, missing, sizes)
    for file in missing:
        part_size = sizes.get(f"{file.name}.part", 0)
        done = _push_file(device, folder, file, done, total, progress, part_size)
    if progress is not None:
        progress(total, total)
    return f"{folder}/{source.name}"


def _files(source: Path) -> Iterator[_File]:
    if (source / MANIFEST).is_file():
        paths = Bundle.open(source).paths()  # not what else lies in its folder
    elif source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.is_file())
    elif source.is_file():
        paths = [source]
    else:
        raise UsageError(f"{source}: no such file or folder")
    for path in paths:
        name = path.relative_to(source.parent).as_posix()
        if "\n" in name:
            raise UsageError(f"{path}: a name with a line break cannot be sent")
        yield _File(path, name, path.stat().st_size, remembered_sha256(path))


def _there(device: ShellDevice, folder: str) -> tuple[dict[str, str], dict[str, int]]:
    """Files on the device: the SHA-256 of those verified and unchanged, and the size of all, by name."""
    quoted = shlex.quote(folder)
    said = device.sh(
        f"mkdir -p {quoted} && cd {quoted} && cat {quoted}.pushed 2>/dev/null; echo '###'\n"
        "find . -type f -exec stat -c '%s %Y %n' {} +"
    )
    noted, _, found = said.partition("###\n")
    notes = {name: (sha, at) for sha, at, name in map(_fields, noted.splitlines()) if name}
    verified, sizes = {}, {}
    for line in found.splitlines():
        size, mtime, path = line.split(" ", 2)
        name = posixpath.normpath(path)
        sizes[name] = int(size)
        sha256, at = notes.get(name, ("", ""))
        if at == f"{size} {mtime}":
            verified[name] = sha256
    return verified, sizes


def _fields(note: str) -> tuple[str, str, str]:
    """SHA-256, "SIZE MTIME" and name; no name for a line that was cut short."""
    fields = note.split(" ", 3)
    return (fields[0], f"{fields[1]} {fields[2]}", fields[3]) if len(fields) == 4 else ("", "", "")


def _check_room(device: FileDevice, missing: list[_File], sizes: dict[str, int]) -> None:
    if not missing:
        return
    free = device.free_bytes()
    if free is None:
        return  # then the write itself fails
    # Old versions and parts are replaced, so their room counts as free.
    freed = sum(sizes.get(f"{file.name}{end}", 0) for file in missing for end in ("", ".part"))
    need = sum(file.size for file in missing) - freed
    if need > free:
        raise device.no_space(f"{format_size(need)} to send, {format_size(free)} free")


def _push_file(
    device: ShellDevice,
    folder: str,
    file: _File,
    done: int,
    total: int,
    progress: Progress | None,
    part_size: int,
) -> int:
    """Sends one file, of which the device may have `part_size` bytes; returns the bytes sent so far."""
    target = f"{folder}/{file.name}"
    part, quoted = shlex.quote(f"{target}.part"), shlex.quote(target)
    patience = 30 + file.size / HASH_BYTES_S
    start = _resumable(device, part, file, part_size, patience)
    done += start
    if progress is not None:
        progress(done, total)

    def sent(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    # The old file goes first: its room may be needed.
    parent, write = shlex.quote(posixpath.dirname(target)), ">>" if start else ">"
    name = shlex.quote(f" {file.name}")
    script = (
        f"mkdir -p {parent} && rm -f {quoted} && cat {write}{part} && got=$(sha256sum <{part}) || exit\n"
        f'[ "${{got%% *}}" = {file.sha256} ] || {{ echo "arrived changed: SHA-256 $got" >&2; exit 1; }}\n'
        f"mv {part} {quoted} && note=\"{file.sha256} $(stat -c '%s %Y' {quoted})\" &&"
        f' printf "%s%s\\n" "$note" {name} >>{shlex.quote(folder)}.pushed'
    )
    with file.source.open("rb") as stream:
        stream.seek(start)
        answer = device.send(script, stream, sent, patience)
    if answer.exit_code:
        # A part that does not fit only takes room from others.
        device.sh(f"rm -f {part}")
        device.expect(answer)
    return done


def _resumable(device: ShellDevice, part: str, file: _File, part_size: int, patience: float) -> int:
    """Bytes of a part on the device that is a beginning of the file."""
    if not 0 < part_size <= file.size:
        return 0
    got = device.sh(f"sha256sum <{part}", timeout=patience).split()[0]
    with file.source.open("rb") as stream:
        return part_size if _prefix_sha256(stream, part_size) == got else 0


def _prefix_sha256(stream: IO[bytes], size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (piece := stream.read(min(size, 1 << 20))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def pull(device: ShellDevice, path: str, target: Path) -> None:
    """Copies a file from a device; see `Device.pull`.

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
