"""Huge pages: who is started anew, once, as the same process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_edge.runtime.artifacts.onnx_files import DECODER_DATA
from gemma_edge.runtime.host import huge_pages
from gemma_edge.runtime.host.huge_pages import TUNABLE, VARIABLE, WORTHWHILE, restart_with_huge_pages


class Started(Exception):
    """Stands for the program that takes this one's place."""


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    """A bundle whose weights are large, though they take no disk."""
    with (tmp_path / DECODER_DATA).open("wb") as file:
        file.truncate(WORTHWHILE)
    return str(tmp_path)


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system gives huge pages to those who ask, and glibc can; what would be started is raised."""
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "SETTING", path)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    monkeypatch.delenv(VARIABLE, raising=False)

    def start(program: str, argv: list[str], variables: dict[str, str]) -> None:
        raise Started(program, argv, variables[VARIABLE])

    monkeypatch.setattr(os, "execve", start)
    return path


def test_a_large_bundle_is_read_in_huge_pages(
    bundle: str, setting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [sys.executable, *sys.orig_argv[1:]]
    with pytest.raises(Started) as started:
        restart_with_huge_pages(["run", "-m", bundle, "Why?"])
    assert started.value.args == (sys.executable, expected, f"{TUNABLE}=1")
    monkeypatch.setenv(VARIABLE, "glibc.malloc.arena_max=2")
    with pytest.raises(Started) as started:
        restart_with_huge_pages([bundle])
    assert started.value.args[2] == f"glibc.malloc.arena_max=2:{TUNABLE}=1"


def test_who_is_left_alone(bundle: str, setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small := setting.parent / "small").mkdir()
    (small / DECODER_DATA).write_bytes(b"few")
    restart_with_huge_pages(["run", str(small), "Why?", "\0", "x" * 5000])
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, f"{TUNABLE}=0")  # the user's word
        restart_with_huge_pages([bundle])
    for given in ("[always] madvise never", "always madvise [never]"):
        setting.write_text(given)
        restart_with_huge_pages([bundle])
    setting.unlink()
    restart_with_huge_pages([bundle])
    setting.write_text("always [madvise] never")
    for libc in ("glibc 2.34", "musl", None):
        monkeypatch.setattr(os, "confstr", lambda name, libc=libc: libc)
        restart_with_huge_pages([bundle])


def test_the_command_line_starts_anew_once(bundle: str) -> None:
    """A real process: it keeps its id and input, and says so once; whatever this system's setting is."""
    code = (
        "import os, sys\n"
        "print('begun', os.getpid(), flush=True)\n"
        "from gemma_edge.cli.main import main\n"
        "code = main()\n"
        "print(os.environ.get('GLIBC_TUNABLES', ''), sys.stdin.read())\n"
        "sys.exit(code)"
    )
    variables = {name: value for name, value in os.environ.items() if name != VARIABLE}
    run = subprocess.run(
        [sys.executable, "-c", code, "inspect", bundle],
        input="a question",
        capture_output=True,
        text=True,
        env=variables,
        timeout=120,
    )
    assert run.returncode == 3, run.stderr  # it is no bundle
    *begun, last = run.stdout.splitlines()
    assert len(set(begun)) == 1, "one process"
    if huge_pages._asked_for():
        assert len(begun) == 2 and last == f"{TUNABLE}=1 a question"
    else:
        assert len(begun) == 1 and last == " a question"
