"""Completion in a real bash at a real terminal."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_edge.cli import main as cli
from support.terminal import Terminal

pytest.importorskip("argcomplete")
pytestmark = pytest.mark.slow
PROMPT = "READY>"


@pytest.fixture
def bash(tmp_path: Path) -> Iterator[Terminal]:
    if not shutil.which("bash"):
        pytest.skip("no bash")
    (tmp_path / "bundle-of-mine").mkdir()
    program = tmp_path / "bin" / "gemma-edge"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gemma_edge "$@"\n')
    program.chmod(0o755)
    variables = {"PATH": f"{program.parent}:{os.environ['PATH']}", "TERM": "dumb"}
    with Terminal(["bash", "--norc", "--noprofile", "-i"], tmp_path, variables) as terminal:
        terminal.type(f"bind 'set bell-style none'; PS1='{PROMPT[:3]}''{PROMPT[3:]}'\n")
        terminal.read_to(PROMPT)
        terminal.type('eval "$(gemma-edge completion bash)"\n')
        terminal.read_to(PROMPT)
        yield terminal


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("exp", "export "),
        ("transc", "transcribe "),
        ("export ckpt out --ceil", "--ceiling "),
        ("export ckpt out --recipe int4_ch", "int4_channelwise "),
        ("export ckpt out --format tfl", "tflite "),
        ("run bundle-o", "bundle-of-mine"),
        ("run -m bundle-o", "bundle-of-mine"),
        ("bench out --ass", "--assert-"),
    ],
)
def test_tab_completes_in_bash(bash: Terminal, typed: str, completed: str) -> None:
    bash.type(f"gemma-edge {typed}\t")
    start = typed.rpartition(" ")[0]
    bash.read_to(re.escape(f"gemma-edge {start} {completed}" if start else f"gemma-edge {completed}"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shells_code_is_printed_and_parses(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "gemma-edge" in code
    if program := shutil.which(shell):
        (tmp_path / "code").write_text(code)
        subprocess.run([program, "-n", tmp_path / "code"], check=True)
