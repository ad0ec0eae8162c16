"""Installs gemma-edge on a device, in a virtual environment, without the device's network.

This machine fetches wheels for the device's processor, libc and Python, and builds a wheel of this package:
the device measures the same code. The environment's name follows from these wheels, so the next run finds it
ready.
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
import zipfile
from collections.abc import Iterator
from pathlib import Path

from gemma_edge.devices.base import DeviceFacts
from gemma_edge.devices.push import FileDevice
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.files.cache_folder import cache_folder

INSTALL_S = 900.0  # seconds that an SD card may take
_OLDEST_PYTHON = (3, 11)
# The packages that a measured run imports; the exporter is not needed there.
_PACKAGES = ("gemma_edge.runtime", "gemma_edge.devices", "gemma_edge.benchmarks", "gemma_edge.cli")
_DISTRIBUTION = "gemma-edge"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def install(device: FileDevice) -> str:
    """The path of the environment's interpreter on the device.

    Raises:
        DeviceError: no usable Python there, no wheels for it, no room.
    """
    facts = device.facts
    wheels = fetch_wheels(facts)
    key = hashlib.sha256("\n".join(sorted(path.name for path in wheels.iterdir())).encode())
    key.update(next(wheels.glob("gemma_edge-*.whl")).read_bytes())
    venv = f"{device.root}/python-{key.hexdigest()[:12]}"
    python, quoted = f"{venv}/bin/python", shlex.quote(venv)
    if device.answer(f"test -f {quoted}/ready").exit_code == 0:
        return python
    there = shlex.quote(device.push(wheels))
    pip = max(wheels.glob("pip-*.whl")).name
    # Without ensurepip, which Debian has in a package of its own; pip runs from its wheel.
    script = (
        f"rm -rf {quoted} && python3 -m venv --without-pip {quoted} && "
        f"{shlex.quote(python)} {there}/{pip}/pip install --quiet --disable-pip-version-check --no-compile "
        f"--no-index --find-links {there} {_DISTRIBUTION} && : >{quoted}/ready"
    )
    device.run(["sh", "-c", script], timeout=INSTALL_S, what="the installation").check("the installation")
    return python


def fetch_wheels(facts: DeviceFacts) -> Path:
    """A folder, in the cache here, with all wheels for a device: dependencies, pip, and this package.

    Raises:
        DeviceError: the device has no Python 3.11 or newer, or its system has no wheels.
    """
    version = tuple(map(int, re.findall(r"\d+", facts.python or "")[:2]))
    if version < _OLDEST_PYTHON:
        found = f"its python3 is {facts.python}" if facts.python else "it has no python3"
        raise DeviceError(f"{facts.spec}: {found}; 3.11 or newer is needed")
    platforms = platform_tags(facts)
    folder = cache_folder() / "wheels" / f"{platforms[0]}-cp{version[0]}{version[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    requirements = _requirements()
    wanted = folder.with_name(f"{folder.name}.requirements")
    text = "\n".join(requirements)
    if not wanted.exists() or wanted.read_text() != text:
        for old in folder.glob("*.whl"):
            old.unlink()
        _download(facts, folder, platforms, version, [*requirements, "pip"])
        wanted.write_text(text)
    for old in folder.glob("gemma_edge-*.whl"):
        old.unlink()
    write_wheel(folder)
    return folder


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
    for package in _PACKAGES:
        module = importlib.import_module(package)
        for folder in map(Path, module.__path__):
            for path in sorted(folder.rglob("*")):
                if path.suffix in (".py", ".sh", ".typed", ".json"):
                    name = f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
                    yield name, path.read_bytes()


def _requirements() -> list[str]:
    """The requirements of a plain install; devices get no extras."""
    return sorted(line for line in _distribution().requires or [] if "extra ==" not in line)


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
