"""docs/fine-tuning.md as it is printed: train an adapter, export with it, and get better at the task."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.repository import ROOT, blocks

PAGE = ROOT / "docs" / "fine-tuning.md"


def test_the_page_teaches_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[..., tuple[int, str, str]]
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").symlink_to(ROOT / "pocket")
    (script,) = blocks(PAGE, "python")
    Path("tune.py").write_text(script, encoding="utf-8")
    # Beside other programs, torch's threads wait for each other longer than they work.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "tune.py"], capture_output=True, text=True, env=alone, check=False)
    assert done.returncode == 0, done.stderr
    right = []
    for line in "".join(blocks(PAGE, "sh")).splitlines():
        if "google/" in line:
            continue  # the page's first example, with a published checkpoint
        program, *words = shlex.split(line)
        code, out, told = said(*words)
        assert (program, code) == ("gemma-edge", 0), told
        right += re.findall(r"(\d+) of 20", out)
    plain, tuned = map(int, right)
    assert plain <= 4 and tuned >= 12
