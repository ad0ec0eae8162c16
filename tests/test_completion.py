"""Completion in a real bash at a real terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_edge.cli import main as cli
from support.processes import PATIENCE_S

pytest.importorskip("argcomplete")
pytestmark = pytest.mark.slow
PROMPT = "READY>"


class Terminal:
    """An interactive bash in which `gemma-edge` is this one."""

    def __init__(self, folder: Path) -> None:
        program = folder / "bin" / "gemma-edge"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gemma_edge "$@"\n')
        program.chmod(0o755)
        environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "TERM": "dumb"}
        self.pid, self.descriptor = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        self.type(f"bind 'set bell-style none'; PS1='{PROMPT[:3]}''{PROMPT[3:]}'\n")
        self.read_to(PROMPT)

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read_to(self, pattern: str) -> str:
        """What is shown until the pattern is."""
        shown, deadline = "", time.monotonic() + PATIENCE_S
        while not re.search(pattern, shown):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {shown!r}"
            if select.select([self.descriptor], [], [], 0.1)[0]:
                shown += os.read(self.descriptor, 4096).decode()
        return shown

    def close(self) -> None:
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        os.close(self.descriptor)


@pytest.fixture
def bash(tmp_path: Path) -> Iterator[Terminal]:
    if not shutil.which("bash"):
        pytest.skip("no bash")
    (tmp_path / "bundle-of-mine").mkdir()
    terminal = Terminal(tmp_path)
    terminal.type('eval "$(gemma-edge completion bash)"\n')
    terminal.read_to(PROMPT)
    try:
        yield terminal
    finally:
        terminal.close()


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
