"""What pip installs: wheel and source distribution have every file of the packages, and no links."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.repository import PACKAGES, ROOT

pytest.importorskip("setuptools")
KINDS = {".py", ".json", ".toml", ".sh", ".typed", ".html", ".css", ".js", ".svg", ".webmanifest"}
SDIST = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"


def run(*argv: str | Path, cwd: Path) -> None:
    done = subprocess.run(list(map(str, argv)), cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def files_of_the_packages() -> dict[str, Path]:
    """By their names in a wheel."""
    sources = [path for top in PACKAGES for path in (ROOT / top).rglob("*") if path.suffix in KINDS]
    pocket = [path for path in (ROOT / "pocket" / "checkpoint").rglob("*") if path.is_file()]
    top = [path for path in (ROOT / "src" / "gemma_edge").iterdir() if path.is_file()]
    assert {path.name for path in top} == {"__init__.py", "__main__.py", "py.typed"}
    return (
        {f"gemma_edge/{path.name}": path for path in top}
        | {f"gemma_edge/{path.relative_to(ROOT)}": path for path in sources}
        | {f"gemma_edge/pocket/{path.relative_to(ROOT / 'pocket' / 'checkpoint')}": path for path in pocket}
    )


def build_wheel(tree: Path, folder: Path) -> zipfile.ZipFile:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w")
    run(*pip, folder, tree, cwd=folder)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_wheel_and_source_distribution_have_every_file(tmp_path: Path) -> None:
    tree, unpacked = tmp_path / "tree", tmp_path / "unpacked"
    tree.mkdir()
    for name in (*PACKAGES, "src", "pocket", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)

    run(sys.executable, "-c", SDIST, tmp_path, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        assert [member.name for member in file if member.issym() or member.islnk()] == []
        file.extractall(unpacked, filter="data")
    (from_sdist,) = unpacked.iterdir()
    assert not (from_sdist / "tests").exists()  # without their support files they could not run

    wheels = []
    for source in (tree, from_sdist):
        folder = tmp_path / f"wheel-{len(wheels)}"
        folder.mkdir()
        wheels.append(build_wheel(source, folder))
    expected = files_of_the_packages()
    for wheel in wheels:
        names = set(wheel.namelist())
        assert "optimum/commands/register/register_gemma_edge.py" in names
        assert set(expected) - names == set()
        assert [name for name, path in expected.items() if wheel.read(name) != path.read_bytes()] == []
    assert wheels[0].namelist() == wheels[1].namelist()
