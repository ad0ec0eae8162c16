"""The native runner, built by its own script."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "android_demo" / "bench" / "build.sh"


def build_runner(target: str, folder: Path) -> Path:
    """The runner's folder; skips without a compiler or pip's index."""
    if not any(map(shutil.which, ("cc", "clang", "clang-16"))):
        pytest.skip("no C compiler")
    done = subprocess.run([BUILD, target, folder], capture_output=True, encoding="utf-8")
    if "No matching distribution" in done.stderr:
        pytest.skip("no wheel of litert-lm-api")
    assert done.returncode == 0, done.stderr
    return folder
