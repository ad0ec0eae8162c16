"""supervise.sh in the shells that devices have: dash, bash, BusyBox, and mksh, which is Android's."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.device_servers import sleeping, wait_for

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "devices" / "supervise.sh"
SHELLS = [["dash"], ["bash", "--posix"], ["busybox", "sh"], ["mksh"]]
_numbers = itertools.count(200_000 + os.getpid() * 100)


@pytest.fixture(params=SHELLS, ids=lambda words: words[0])
def shell(request: pytest.FixtureRequest) -> list[str]:
    words: list[str] = request.param
    if shutil.which(words[0]) is None:
        pytest.skip(f"no {words[0]}")
    return words


@pytest.fixture
def number() -> Iterator[str]:
    number = str(next(_numbers))
    yield number
    wait_for(lambda: not sleeping(number), "left running")


def start(
    shell: list[str],
    folder: Path,
    *argv: str,
    limit: int = 3000,
    silence: int = 3000,
    interval: str = "0.1",
) -> subprocess.Popen[str]:
    words = [*shell, str(SCRIPT), "run", "TOKEN", str(limit), str(silence), interval, argv[0], *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")


def end(process: subprocess.Popen[str]) -> tuple[str, str, list[str], str]:
    """stdout, stderr up to the end of the program, the last line's reason and code, and all of stderr."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.wait(10)
    stdout, stderr = process.stdout.read(), process.stderr.read()
    for stream in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):  # a pulse that was too late
            stream.close()
    return stdout, stderr.partition("\nTOKEN over\n")[0], stderr.splitlines()[-1].split()[:4], stderr


def test_it_passes_on_code_and_streams_and_samples(shell: list[str], tmp_path: Path) -> None:
    process = start(shell, tmp_path, "sh", "-c", "echo out; echo err >&2; sleep 0.3; exit 7")
    stdout, stderr, last, everything = end(process)
    assert (stdout, stderr, last) == ("out\n", "err\n", ["TOKEN", "end", "exit", "7"])
    samples = [line.split() for line in everything.splitlines() if line.startswith("TOKEN sample ")]
    assert len(samples) >= 2 and all(len(sample) == 7 for sample in samples)
    assert not list(tmp_path.iterdir())


def test_it_keeps_the_limit(shell: list[str], tmp_path: Path, number: str) -> None:
    process = start(shell, tmp_path, "sh", "-c", f"setsid sleep {number} & sleep {number}", limit=30)
    wait_for(lambda: len(sleeping(number)) == 2, "they never ran")
    _, _, last, _ = end(process)
    assert last[2] == "limit" and int(last[3]) > 128


def test_it_ends_when_nobody_is_heard(shell: list[str], tmp_path: Path, number: str) -> None:
    process = start(shell, tmp_path, "sleep", number, silence=30)
    assert end(process)[2][:3] == ["TOKEN", "end", "lost"]


def test_it_goes_on_while_somebody_is_heard(shell: list[str], tmp_path: Path) -> None:
    process = start(shell, tmp_path, "sleep", "0.8", silence=50)
    assert process.stdin is not None
    # It may end between the question and the pulse.
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            process.stdin.write("\n")
            process.stdin.flush()
            process.wait(0.1)
    assert end(process)[2] == ["TOKEN", "end", "exit", "0"]


def test_many_pulses_do_not_disturb_the_clock(shell: list[str], tmp_path: Path) -> None:
    process = start(shell, tmp_path, "sleep", "2", interval="0.001")
    assert process.stdin is not None
    while process.poll() is None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("\n")
            process.stdin.flush()
        time.sleep(0.0003)
    assert end(process)[2] == ["TOKEN", "end", "exit", "0"]


def test_it_ends_with_the_connection_under_nohup_too(shell: list[str], tmp_path: Path, number: str) -> None:
    process = start(["nohup", *shell], tmp_path, "sleep", number)
    wait_for(lambda: sleeping(number), "it never ran")
    assert process.stdin is not None
    process.stdin.close()
    assert end(process)[2][:3] == ["TOKEN", "end", "lost"]


def test_it_ends_with_the_connection(shell: list[str], tmp_path: Path, number: str) -> None:
    process = start(shell, tmp_path, "sleep", number)
    wait_for(lambda: sleeping(number), "it never ran")
    assert process.stdin is not None
    process.stdin.close()
    assert end(process)[2][:3] == ["TOKEN", "end", "lost"]


def test_the_program_ends_although_the_supervisor_was_killed(
    shell: list[str], tmp_path: Path, number: str
) -> None:
    process = start(shell, tmp_path, "sleep", number)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    # The program, and who watches and who listens. Before that only the limit would end it.
    wait_for(lambda: sleeping(number) and len(children.read_text().split()) == 3, "it never ran")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # The fixture waits for the program to be gone.


def test_stop_ends_what_carries_the_token(shell: list[str], tmp_path: Path, number: str) -> None:
    process = start(shell, tmp_path, "sleep", number)
    wait_for(lambda: sleeping(number), "it never ran")
    subprocess.run([*shell, str(SCRIPT), "stop", "OTHER"], cwd=tmp_path, check=True)
    assert sleeping(number)
    subprocess.run([*shell, str(SCRIPT), "stop", "TOKEN"], cwd=tmp_path, check=True)
    assert end(process)[2] == ["TOKEN", "end", "exit", "137"]
