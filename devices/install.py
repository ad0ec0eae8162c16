"""Installs gemma-edge on a device, in a virtual environment, without the device's network.

This machine fetches wheels for the device's processor, libc and Python, and builds a wheel of this package:
the device runs the same code. Only what is needed is sent: the engine of a bundle, the packages of an extra.
The wheels are removed there once they are installed.

    ROOT/python-KEY/          an environment
    ROOT/python-KEY/ready     the SHA-256 of our wheel, and the requirements that are installed, a line each
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gemma_edge
from gemma_edge.devices.base import DeviceFacts, Progress
from gemma_edge.devices.doctor import cannot_install
from gemma_edge.devices.facts import version_of
from gemma_edge.devices.push import FileDevice
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.cache_folder import cache_folder
from gemma_edge.runtime.units import format_size

INSTALL_S = 900.0  # seconds that an SD card may take
# What this package may need there: everything but Pocket, which a bundle is made of.
_PACKAGES = ("runtime", "export", "devices", "benchmarks", "cli")
_SENT = (".py", ".sh", ".typed", ".json", ".toml", ".j2", ".html", ".css", ".js", ".svg", ".webmanifest")
_DISTRIBUTION = "gemma-edge"
_EPOCH = (1980, 1, 1, 0, 0, 0)
ENGINE_PACKAGES = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert"}  # by the engine's key
# Brings the wheels of an interpreter without Debian's ensurepip, which is a package of its own.
_INSTALL = """\
rm -rf {venv} && {program} -m venv --without-pip {venv} && cd {wheels} || exit
for wheel in ./*.whl; do
  case $wheel in ./pip-*) ;; *) set -- "$@" "$wheel" ;; esac
done
{python} {pip}/pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile \\
  --no-index --no-deps "$@" &&
  printf %s {ready} >{venv}/ready"""


@dataclass(frozen=True)
class Needs:
    """What an environment must have beside the runtime.

    engines: keys of `runtime.engines`; None for all of them.
    extras: of pyproject.toml: "images", "audio", "serve".
    """

    engines: tuple[str, ...] | None = None
    extras: tuple[str, ...] = ()

    def requirements(self) -> list[str]:
        """As pip takes them.

        Raises:
            UsageError: there is no such extra.
        """
        lines = _distribution().requires or []
        if unknown := set(self.extras) - set(_distribution().metadata.get_all("Provides-Extra") or []):
            raise UsageError(
                f"there is no extra {min(unknown)!r}; if it is new, install gemma-edge here again"
            )
        plain = {line for line in lines if "extra ==" not in line}
        if self.engines is not None:
            unneeded = [name for key, name in ENGINE_PACKAGES.items() if key not in self.engines]
            plain = {line for line in plain if _name_of(line) not in unneeded}
        marks = {each: re.compile(rf"extra == [\"']{re.escape(each)}[\"']") for each in self.extras}
        for line in lines:
            requirement, _, marker = line.partition(";")
            if any(mark.search(marker) for mark in marks.values()):
                plain.add(requirement.strip())
        return sorted(plain)


ALL_ENGINES = Needs()


def install(device: FileDevice, needs: Needs = ALL_ENGINES, progress: Progress | None = None) -> str:
    """The path of an environment's interpreter on the device, which has what is needed.

    Raises:
        DeviceError: no usable Python there, no wheels for it, no room.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours = write_wheel(Path(folder)).read_bytes()
    wanted = {hashlib.sha256(ours).hexdigest(), *needs.requirements()}
    for venv, has in environments(device).items():
        if wanted <= has:
            return f"{venv}/bin/python"
    facts = device.facts
    wheels = fetch_wheels(facts, needs)
    key = hashlib.sha256("\n".join(sorted(wanted)).encode()).hexdigest()[:12]
    venv = f"{device.root}/python-{key}"
    _check_room(device, wheels)
    there = device.push(wheels, progress=progress)
    try:
        script = _INSTALL.format(
            venv=shlex.quote(venv),
            python=shlex.quote(f"{venv}/bin/python"),
            program=facts.python_program,
            wheels=shlex.quote(there),
            pip=max(wheels.glob("pip-*.whl")).name,
            ready=shlex.quote("".join(f"{line}\n" for line in sorted(wanted))),
        )
        device.run(["sh", "-c", script], timeout=INSTALL_S, what="the installation").check("the installation")
    finally:
        device.remove_pushed(there)
    return f"{venv}/bin/python"


def environments(device: FileDevice) -> dict[str, set[str]]:
    """The environments of ours on a device: the lines of `ready`, by folder."""
    said = device.sh(
        f"cd {shlex.quote(device.root)} && for file in python-*/ready; do"
        ' [ ! -f "$file" ] || { echo "### ${file%/ready}"; cat "$file"; }; done'
    )
    found: dict[str, set[str]] = {}
    for part in said.split("### ")[1:]:
        name, *lines = part.splitlines()
        found[f"{device.root}/{name}"] = set(lines)
    return found


def fetch_wheels(facts: DeviceFacts, needs: Needs = ALL_ENGINES) -> Path:
    """A folder, in the cache here, with all wheels for a device: dependencies, pip, and this package.

    Raises:
        DeviceError: the device has no Python 3.11 or newer, or its system has no wheels.
    """
    if reason := cannot_install(facts):
        raise DeviceError(f"{facts.spec}: {reason.name}: {reason.found}. Remedy: {reason.remedy}")
    version = version_of(facts.python)
    platforms = platform_tags(facts)
    requirements = needs.requirements()
    text = "\n".join(requirements)
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    folder = cache_folder() / "wheels" / f"{platforms[0]}-cp{version[0]}{version[1]}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder.with_name(f"{folder.name}.requirements")
    if not wanted.exists() or wanted.read_text() != text:
        for old in folder.glob("*.whl"):
            old.unlink()
        _download(facts, folder, platforms, version, [*requirements, "pip"])
        wanted.write_text(text)
    for old in folder.glob("gemma_edge-*.whl"):
        old.unlink()
    write_wheel(folder)
    return folder


def unpacked_bytes(wheels: Path) -> int:
    """What the wheels of a folder take once they are installed."""
    total = 0
    for path in wheels.glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            total += sum(entry.file_size for entry in archive.infolist())
    return total


def _check_room(device: FileDevice, wheels: Path) -> None:
    need = unpacked_bytes(wheels) + sum(path.stat().st_size for path in wheels.glob("*.whl"))
    free = device.free_bytes()
    if free is not None and need > free:
        raise device.no_space(f"{format_size(need)} to install, {format_size(free)} free")


def platform_tags(facts: DeviceFacts) -> list[str]:
    """Tags of wheels that run on a device, the newest libc first.

    Raises:
        DeviceError: a libc without wheels.
    """
    match = re.fullmatch(r"glibc 2\.(\d+)", facts.libc or "")
    if match is None:
        raise DeviceError(f"{facts.spec}: wheels need glibc, and its libc is {facts.libc or 'unknown'}")
    minors = range(int(match[1]), 16, -1)
    if not minors:
        raise DeviceError(f"{facts.spec}: its {facts.libc} is older than any wheel's")
    return [*(f"manylinux_2_{minor}_{facts.arch}" for minor in minors), f"manylinux2014_{facts.arch}"]


def write_wheel(folder: Path) -> Path:
    """Writes this package, as it is here, as a wheel. The same sources give the same bytes.

    Raises:
        DeviceError: gemma-edge is not installed here.
    """
    distribution = _distribution()
    base = f"gemma_edge-{distribution.version}"
    # A checkout that was built has an .egg-info, which is found too; its metadata goes by another name.
    metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    entries = {
        f"{base}.dist-info/METADATA": metadata.encode(),
        f"{base}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: gemma-edge\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
        f"{base}.dist-info/entry_points.txt": (distribution.read_text("entry_points.txt") or "").encode(),
        **dict(_sources()),
    }
    record = f"{base}.dist-info/RECORD"
    lines = [f"{name},sha256={_record_hash(data)},{len(data)}\n" for name, data in entries.items()]
    entries[record] = "".join([*lines, f"{record},,\n"]).encode()
    path = folder / f"{base}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return path


def _sources() -> Iterator[tuple[str, bytes]]:
    (root,) = map(Path, gemma_edge.__path__)
    for path in sorted(root.glob("*.py")):
        yield f"gemma_edge/{path.name}", path.read_bytes()
    for package in _PACKAGES:
        module = importlib.import_module(f"gemma_edge.{package}")
        for folder in map(Path, module.__path__):
            for path in sorted(folder.rglob("*")):
                if path.suffix in _SENT and path.name != "__main__.py":
                    yield f"gemma_edge/{package}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def _name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise DeviceError("gemma-edge is not installed here, so it cannot be put on a device") from None


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _download(
    facts: DeviceFacts, folder: Path, platforms: list[str], version: tuple[int, ...], names: list[str]
) -> None:
    tag = f"cp{version[0]}{version[1]}"
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    argv += ["--only-binary=:all:", "--dest", str(folder), "--implementation", "cp"]
    argv += ["--python-version", f"{version[0]}.{version[1]}"]
    argv += [word for abi in (tag, "abi3", "none") for word in ("--abi", abi)]
    argv += [word for platform in platforms for word in ("--platform", platform)]
    done = subprocess.run(
        [*argv, *names], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DeviceError(f"{facts.spec}: no wheels for {facts.arch}, {facts.libc}, Python {tag[2:]}: {said}")
