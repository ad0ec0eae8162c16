"""supervise.sh in the shells that devices have: dash, bash, BusyBox, and mksh, which is Android's."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.processes import PATIENCE_S, children, sleeping, wait_for

SCRIPT = Path(__file__).parent.parent / "devices" / "supervise.sh"
CLOCK = "/proc/uptime"
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


class Clock:
    """A supervisor whose time is as long as a test says."""

    def __init__(self, folder: Path) -> None:
        self.script, self.file = folder / "supervise.sh", folder / "uptime"
        text = SCRIPT.read_text()
        assert text.count(f"<{CLOCK}") == 2
        self.script.write_text(text.replace(f"<{CLOCK}", f"<'{self.file}'"))
        self.set(100)

    def set(self, seconds: float) -> None:
        """A reader sees the old time or the new one."""
        new = self.file.with_suffix(".new")
        new.write_text(f"{seconds:.2f} 0.00\n")
        new.rename(self.file)


@pytest.fixture
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    return Clock(tmp_path_factory.mktemp("clock"))


def start(
    shell: list[str],
    folder: Path,
    *argv: str,
    limit: int = 60000,
    silence: int = 6000,
    interval: str = "0.1",
    script: Path = SCRIPT,
) -> subprocess.Popen[str]:
    words = [*shell, str(script), "run", "TOKEN", str(limit), str(silence), interval, argv[0], *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")


def end(process: subprocess.Popen[str]) -> tuple[str, str, list[str], str]:
    """stdout, stderr up to the end of the program, the last line's reason and code, and all of stderr."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.wait(PATIENCE_S)
    stdout, stderr = process.stdout.read(), process.stderr.read()
    for stream in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):  # a pulse that was too late
            stream.close()
    return stdout, stderr.partition("\nTOKEN over\n")[0], stderr.splitlines()[-1].split()[:4], stderr


def until(file: Path) -> tuple[str, str, str]:
    """A program that ends with code 7 once there is that file."""
    return "sh", "-c", f"echo out; echo err >&2; until [ -e '{file}' ]; do sleep 0.02; done; exit 7"


def samples(folder: Path) -> int:
    """How often the running program was sampled so far."""
    file = folder / "run-TOKEN"
    return len(file.read_text().splitlines()) if file.exists() else 0


def pulse(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has just ended
        process.stdin.write("\n")
        process.stdin.flush()


def test_it_passes_on_code_and_streams_and_samples(shell: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "device"
    folder.mkdir()
    process = start(shell, folder, *until(tmp_path / "go"))
    wait_for(lambda: samples(folder) >= 2, "it was never sampled")
    (tmp_path / "go").touch()
    stdout, stderr, last, everything = end(process)
    assert (stdout, stderr, last) == ("out\n", "err\n", ["TOKEN", "end", "exit", "7"])
    told = [line.split() for line in everything.splitlines() if line.startswith("TOKEN sample ")]
    assert len(told) >= 2 and all(len(sample) == 7 for sample in told)
    assert not list(folder.iterdir())


def test_it_keeps_the_limit(shell: list[str], tmp_path: Path, number: str, clock: Clock) -> None:
    argv = "sh", "-c", f"setsid sleep {number} & sleep {number}"
    process = start(shell, tmp_path, *argv, limit=3000, script=clock.script)
    wait_for(lambda: len(sleeping(number)) == 2, "they never ran")
    clock.set(131)
    _, _, last, _ = end(process)
    assert last[2] == "limit" and int(last[3]) > 128


def test_it_ends_when_nobody_is_heard(shell: list[str], tmp_path: Path, number: str, clock: Clock) -> None:
    process = start(shell, tmp_path, "sleep", number, silence=3000, script=clock.script)
    wait_for(lambda: sleeping(number), "it never ran")
    clock.set(131)
    assert end(process)[2][:3] == ["TOKEN", "end", "lost"]


def test_it_goes_on_while_somebody_is_heard(shell: list[str], tmp_path: Path, clock: Clock) -> None:
    argv = until(tmp_path / "go")
    process = start(shell, tmp_path, *argv, silence=3000, interval="0.01", script=clock.script)
    for seconds in (120, 140, 160):  # in all, twice the silence that would end it
        clock.set(seconds)
        for heard in range(1, 11):
            pulse(process)
            seen = samples(tmp_path)
            wait_for(
                lambda seen=seen: samples(tmp_path) > seen or process.poll() is not None,
                f"not sampled after pulse {heard}",
            )
    (tmp_path / "go").touch()
    assert end(process)[2] == ["TOKEN", "end", "exit", "7"]


def test_many_pulses_do_not_disturb_the_clock(shell: list[str], tmp_path: Path) -> None:
    process = start(shell, tmp_path, *until(tmp_path / "go"), interval="0.001")
    for _ in range(3000):
        pulse(process)
    wait_for(lambda: samples(tmp_path) >= 2, "it was never sampled")
    (tmp_path / "go").touch()
    assert end(process)[2] == ["TOKEN", "end", "exit", "7"]


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
    # The program, and who watches and who listens. Before that only the limit would end it.
    wait_for(lambda: sleeping(number) and len(children(process.pid)) == 3, "it never ran")
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
