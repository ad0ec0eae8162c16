"""`gemma-edge demo`: run once, as a stranger would, and read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from gemma_edge.cli.demo import CONTEXT
from gemma_edge.cli.main import main
from gemma_edge.runtime.artifacts.bundle import Bundle

# Runs the demo and reports which heavy modules were imported on the way.
SCRIPT = """\
import json, sys
from gemma_edge.cli.main import main
code = main(["demo", "--keep", sys.argv[1]])
print(json.dumps(sorted({"torch", "transformers", "tokenizers"} & set(sys.modules))), file=sys.stderr)
sys.exit(code)
"""


class Demo(NamedTuple):
    folder: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo") / "kept"
    argv = [sys.executable, "-c", SCRIPT, str(folder)]
    result = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    return Demo(folder, result.stdout, result.stderr)


def test_it_needs_no_torch_and_says_nothing_else_on_stderr(demo: Demo) -> None:
    assert json.loads(demo.stderr) == []


def test_it_leaves_a_verified_bundle_in_the_folder_it_was_told_to_keep(demo: Demo) -> None:
    assert sorted(p.name for p in demo.folder.iterdir()) == ["ckpt", "out"]
    bundle = Bundle.open(demo.folder / "out")
    assert bundle.context == CONTEXT
    assert bundle.manifest["agreement"]["tokens"] > 0


def test_it_shows_plan_agreement_text_memory_and_speed(demo: Demo) -> None:
    wanted = (
        "recipe int8; a decode step reads",
        "mean KL divergence",
        "prefill",
        "decode",
        "right",
        "--dry-run",
    )
    assert [text for text in wanted if text not in demo.stdout] == []
    if sys.platform == "linux":
        assert "RssAnon" in demo.stdout and "RssFile" in demo.stdout


def test_the_commands_it_prints_are_commands_with_the_folder_that_was_kept(demo: Demo) -> None:
    commands = [line[2:] for line in demo.stdout.splitlines() if line.startswith("$ ")]
    assert commands[0].startswith("cp -r ")
    assert [command.split()[1] for command in commands[1:7]] == ["export", "verify", *["run"] * 4]
    assert all(str(demo.folder) in command for command in commands)


def test_its_lines_fit_a_terminal(demo: Demo) -> None:
    lines = [line for line in demo.stdout.splitlines() if str(demo.folder) not in line]
    prose = [line for line in lines if not line.startswith('{"id"')]  # a call, as `run` prints it
    assert max(map(len, prose)) <= 100


def test_a_kept_folder_is_not_overwritten(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--keep", str(demo.folder)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
