"""What a new user types in the first hour: the same commands, as programs of their own."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_edge.runtime.artifacts.bundle import Bundle
from support.repository import ROOT, blocks

POCKET = ROOT / "pocket" / "checkpoint"
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
TYPED = [sys.executable, "-m", "gemma_edge.cli.main"]


def typed(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the line of a shell in which `gemma-edge` is this one."""
    command = shlex.join(TYPED)
    line = re.sub(r"\bgemma-edge\b", lambda _: command, line)
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def home(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A working folder with a checkpoint `ckpt`."""
    (tmp_path / "ckpt").symlink_to(tiny_checkpoint)
    return tmp_path


# Exports. -----------------------------------------------------------------------------------------


def test_every_printed_export_runs_on_pocket(tmp_path: Path) -> None:
    """In the order of the pages; a hub's id is a folder here, since nothing is downloaded."""
    for name in ("ckpt", "pocket/checkpoint", "google/gemma-3n-E2B-it"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(POCKET)
    lines = [
        line.removeprefix("$ ").partition("#")[0]
        for page in (README, GUIDE)
        for block in blocks(page, "sh", "console")
        for line in block.splitlines()
        if line.removeprefix("$ ").startswith("gemma-edge export ")
    ]
    assert len(lines) >= 9
    for line in lines:
        done = typed(line, tmp_path)
        assert done.returncode == 0, (line, done.stderr)
    made = ("out", "e2b", "model.litertlm", "all/onnx", "all/tflite", "all/model.litertlm")
    assert [Bundle.open(tmp_path / name).format for name in made] == [
        "onnx", "onnx", "litertlm", "onnx", "tflite", "litertlm"
    ]  # fmt: skip


def test_several_formats_do_not_go_into_a_bundle(home: Path) -> None:
    assert typed("gemma-edge export ckpt out --context 64 --no-verify", home).returncode == 0
    done = typed("gemma-edge export ckpt out --format onnx --format tflite --context 64 --no-verify", home)
    assert done.returncode == 2 and "out is a bundle" in done.stderr
    assert sorted(path.name for path in home.iterdir()) == ["ckpt", "out"]
    assert typed("gemma-edge inspect out", home).returncode == 0


def test_an_export_says_what_it_replaces_and_refuses_what_it_should_not(home: Path) -> None:
    line = "gemma-edge export ckpt out --context 64 --no-verify"
    assert "replaces" not in typed(line, home).stderr
    (home / "out" / "README.md").write_text("mine")
    again = typed(line, home)
    assert again.returncode == 0 and "out: replaces a bundle of ckpt in recipe int4\n" in again.stderr
    other = typed(f"{line} --recipe int8", home)
    assert other.returncode == 2 and "--force replaces it" in other.stderr
    forced = typed(f"{line} --recipe int8 --force", home)
    assert forced.returncode == 0 and "out: replaces a bundle of ckpt in recipe int4\n" in forced.stderr
    assert Bundle.open(home / "out").manifest["recipe"]["name"] == "int8"
    assert (home / "out" / "README.md").read_text() == "mine"


def test_the_suffix_is_the_format(home: Path) -> None:
    done = typed("gemma-edge export ckpt foo.litertlm --context 64 --no-verify", home)
    assert done.returncode == 0 and (home / "foo.litertlm").is_file()
    wrong = typed("gemma-edge export ckpt bar.litertlm --format onnx", home)
    assert wrong.returncode == 2 and "a .litertlm is a file of --format litertlm, not onnx" in wrong.stderr
    assert not (home / "bar.litertlm").exists()


def test_the_ceiling_that_the_plan_shows_is_accepted(home: Path) -> None:
    plan = json.loads(typed("gemma-edge export ckpt --dry-run --json", home).stdout)
    refused = typed(f"gemma-edge export ckpt --dry-run --ceiling {plan['needed_bytes'] - 1}", home)
    assert refused.returncode == 5 and "for file pages in use), the ceiling is" in refused.stderr
    shown = re.search(r"the smallest --ceiling is ([^:]+):", refused.stdout)
    assert shown
    ceiling = shown[1].replace(" ", "")
    assert typed(f"gemma-edge export ckpt --dry-run --ceiling {ceiling}", home).returncode == 0
