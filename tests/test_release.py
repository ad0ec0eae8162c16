"""What is published: a wheel and an sdist that anybody can build again, and a bill of their materials."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "tests", ".venv*", "*.jsonl", "*.png"
)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """Wheel and sdist, built twice, in copies of different names and file times."""
    found = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(ROOT, folder / name, symlinks=True, ignore=LEFT_OUT)
        os.utime(folder / name / "README.md", (10**9, 10**9 + len(found)))
        found.append(script("release").build(folder / name, folder / "out"))
    return found


def test_wheel_and_sdist_are_reproducible(builds: list[list[Path]]) -> None:
    first, second = ({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files} for files in builds)
    assert len(first) == 2
    assert first == second


def test_the_bill_names_every_file_and_dependency(builds: list[list[Path]]) -> None:
    wheel = next(path for path in builds[0] if path.suffix == ".whl")
    bill = script("sbom").bill(wheel)
    assert json.loads(json.dumps(bill)) == bill
    component = bill["metadata"]["component"]
    assert component["hashes"][0]["content"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert any(part["name"] == "gemma_edge/runtime/model.py" for part in component["components"])
    required = {part["name"]: part["version"] for part in bill["components"] if part["scope"] == "required"}
    assert {"numpy", "onnxruntime", "sentencepiece", "jinja2", "ai-edge-litert"} == set(required)


def test_hashed_pins_are_those_of_the_constraints() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    hashed = re.findall(r"^([\w.-]+)==(\S+) \\", (ROOT / "constraints-hashed.txt").read_text(), re.MULTILINE)
    assert len(hashed) > 10
    for name, version in hashed:
        assert pinned.get(name.replace("_", "-"), version) == version
