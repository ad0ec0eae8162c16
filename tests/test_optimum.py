"""`optimum-cli export gemma-edge` is `gemma-edge export`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")
pytest.importorskip("optimum.commands.register.register_gemma_edge", reason="it is not registered")

from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.artifacts.bundle import Bundle

POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"


def optimum_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    # The installed script: `python -m` would find the checkout's registration beside the installed one.
    argv = [Path(sys.executable).with_name("optimum-cli"), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=600)


def test_it_exports(tmp_path):
    checkpoint = synthesize(tmp_path / "checkpoint", "tiny", progress=False).path
    done = optimum_cli("export", "gemma-edge", checkpoint, tmp_path / "out", "--context", 64, "--no-verify")
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "out").context == 64


def test_it_is_called_as_optimums_own_exporters_are(tmp_path):
    command = ("export", "gemma-edge", "-m", POCKET)
    done = optimum_cli(*command, "--task", "image-text-to-text", tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    planned = {part["part"] for part in json.loads(done.stdout)["parts"]}
    assert planned & {"vision", "audio"} == {"vision"}
    done = optimum_cli(*command, tmp_path / "a", tmp_path / "b")
    assert done.returncode == 2 and "name a checkpoint and a bundle" in done.stderr


def test_help_has_the_arguments_of_the_exporter():
    done = optimum_cli("export", "gemma-edge", "--help")
    assert done.returncode == 0
    assert "--recipe" in done.stdout


def test_errors_keep_their_exit_code(tmp_path):
    done = optimum_cli("export", "gemma-edge", tmp_path, tmp_path / "out", "--recipe", "none")
    assert done.returncode in (2, 3)
    assert "Traceback" not in done.stderr


def test_other_commands_do_not_load_the_exporter():
    done = optimum_cli("export", "--help")
    assert "gemma-edge" in done.stdout
    assert done.returncode == 0
