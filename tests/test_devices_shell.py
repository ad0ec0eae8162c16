"""Files, programs and faults on real devices: the same for sshd and for adbd."""

from __future__ import annotations

import _thread
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from gemma_edge.devices import adb, cool_down, open_device, shell
from gemma_edge.devices.machine.child import ChildError
from gemma_edge.devices.shell import ShellDevice
from gemma_edge.runtime.errors import DeviceError, UsageError
from support.device_servers import Adbd, Sshd, adbd_missing, sshd_missing
from support.processes import sleeping, wait_for
from support.small_disk import small_disk

MIB = 1 << 20
_numbers = itertools.count(100_000 + os.getpid() * 100)


@dataclass
class Server:
    """A daemon that can die and come back, and the spec of the device behind it."""

    spec: str
    kill: Callable[[], None]
    revive: Callable[[], None]
    small: str  # the spec of a folder on a disk of a few MB


@pytest.fixture(scope="module", params=["ssh", "adb"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp(request.param)
    if request.param == "ssh":
        if reason := sshd_missing():
            pytest.skip(reason)
        sshd = Sshd(folder)
        sshd.start()
        patch.setenv("GEMMA_EDGE_SSH_CONFIG", str(sshd.config))
        yield Server(f"{sshd.url}{folder}/device", sshd.kill, sshd.start, f"{sshd.url}{folder}/small/device")
        sshd.kill()
    else:
        if reason := adbd_missing():
            pytest.skip(reason)
        adbd = Adbd(folder)
        for name, value in adbd.environment.items():
            patch.setenv(name, value)
        spec = f"adb:{adbd.SERIAL}"
        yield Server(spec, adbd.kill, adbd.revive, spec)
        adbd.close()
    patch.undo()


@pytest.fixture(scope="module")
def device(server: Server) -> Iterator[ShellDevice]:
    with open_device(server.spec) as device:
        assert isinstance(device, ShellDevice)
        yield device


@pytest.fixture
def small_device(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShellDevice]:
    """A device with a few MB of disk, nothing pushed."""
    if not server.spec.startswith("ssh"):
        with open_device(server.small) as device:
            assert isinstance(device, ShellDevice)
            device.sh(f"rm -rf {device.root}/files")
            yield device
        return
    with small_disk(Path(urlsplit(server.small).path).parent, 8), open_device(server.small) as device:
        assert isinstance(device, ShellDevice)
        yield device


@pytest.fixture
def number() -> str:
    """Seconds for `sleep` that no other process on this machine sleeps."""
    return str(next(_numbers))


def when_running(number: str, action: Callable[[], object]) -> threading.Thread:
    """Does it, in a thread, once `sleep NUMBER` runs."""

    def watch() -> None:
        wait_for(lambda: sleeping(number), "it never ran")
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def gone(number: str) -> None:
    wait_for(lambda: not sleeping(number), f"sleep {number} was left running")


# Programs.


def test_run_returns_code_both_streams_and_memory(device: ShellDevice) -> None:
    # It lasts until it was sampled twice.
    sampled = 'until [ "$(cat run-* 2>/dev/null | wc -l)" -ge 2 ]; do sleep 0.1; done'
    script = f'echo "$WORD"; echo "to stderr" >&2; {sampled}; exit 7'
    began = time.monotonic()
    run = device.run(["sh", "-c", script], timeout=60, env={"WORD": 'it\'s "two" words'}, interval=0.1)
    assert (run.exit_code, run.stdout, run.stderr) == (7, 'it\'s "two" words\n', "to stderr\n")
    assert 0.1 <= run.seconds <= time.monotonic() - began + 0.01
    assert len(run.samples) == run.peak.samples >= 2
    assert run.peak.rss == max(point.rss for point in run.samples) > 0
    assert run.peak.high_water >= run.samples[-1].rss
    with pytest.raises(ChildError, match="exit code 7: to stderr"):
        run.check("the script")


def test_run_has_nothing_on_stdin_and_is_in_our_folder(device: ShellDevice) -> None:
    run = device.run(["sh", "-c", "cat; pwd"], timeout=60)
    assert run.stdout == f"{device.root}\n"


def test_run_binds_to_cores(device: ShellDevice) -> None:
    run = device.run(["sh", "-c", "grep Cpus_allowed_list /proc/self/status"], timeout=60, cores=[0])
    assert run.cores == (0,)
    assert run.stdout.split() == ["Cpus_allowed_list:", "0"]


def test_output_of_megabytes_arrives(device: ShellDevice) -> None:
    run = device.run(["head", "-c", "3000000", "/dev/zero"], timeout=60)
    assert len(run.stdout) == 3_000_000


def test_a_program_that_is_not_there(device: ShellDevice) -> None:
    with pytest.raises(DeviceError, match="the kernel cannot be started: there is no no-such-program"):
        device.run(["no-such-program"], timeout=60, what="the kernel")


def test_a_hung_program_is_killed_with_all_it_started(device: ShellDevice, number: str) -> None:
    script = f"setsid sleep {number} & sleep {number}; sleep {number}"
    with pytest.raises(DeviceError, match="did not finish within 1 s and was killed"):
        device.run(["sh", "-c", script], timeout=1, interval=0.1)
    gone(number)


def test_what_a_program_leaves_behind_is_ended(device: ShellDevice, number: str) -> None:
    run = device.run(["sh", "-c", f"setsid sleep {number} >/dev/null 2>&1 & sleep 0.2"], timeout=60)
    assert run.exit_code == 0
    gone(number)


def test_a_killed_program_is_a_device_error(device: ShellDevice, number: str) -> None:
    thread = when_running(number, lambda: [os.kill(pid, signal.SIGKILL) for pid in sleeping(number)])
    run = device.run(["sleep", number], timeout=60)
    thread.join()
    assert run.exit_code == 137
    with pytest.raises(DeviceError, match="the kernel was ended by signal 9"):
        run.check("the kernel")


def test_ctrl_c_ends_it_there(device: ShellDevice, number: str) -> None:
    thread = when_running(number, _thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        device.run(["sleep", number], timeout=60)
    thread.join()
    gone(number)


def test_death_of_this_end_ends_it_there(server: Server, number: str) -> None:
    script = (
        "from gemma_edge.devices import open_device\n"
        f"open_device({server.spec!r}).run(['sleep', {number!r}], timeout=60)"
    )
    ours = subprocess.Popen([sys.executable, "-c", script])
    wait_for(lambda: sleeping(number), "it never ran")
    ours.kill()
    ours.wait()
    gone(number)


def test_silence_ends_it_there(device: ShellDevice, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "SILENCE_S", 0.5)
    with pytest.raises(DeviceError, match="the device heard nothing from here"):
        device.run(["sleep", number], timeout=60, interval=0.1)
    gone(number)


# Files.


def test_a_folder_whose_name_ends_in_a_space_is_itself(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"{server.spec}%20" if server.spec.startswith("ssh") else server.spec
    root = (urlsplit(server.spec).path if server.spec.startswith("ssh") else adb.ROOT) + " "
    monkeypatch.setattr(adb, "ROOT", root)  # no spec names another
    (tmp_path / "name ").write_bytes(b"content")
    with open_device(spec) as device:
        assert isinstance(device, ShellDevice)
        assert device.root == root
        assert device.run(["pwd", "-P"], timeout=60).stdout == f"{root}\n"
        path = device.push(tmp_path / "name ")
        assert path.startswith(f"{root}/") and path.endswith("/name ")
        device.pull(path, tmp_path / "back ")
        assert (tmp_path / "back ").read_bytes() == b"content"
        device.sh(f'rm -r "{root}"')


def test_push_and_pull_are_exact_and_sent_once(device: ShellDevice, tmp_path: Path) -> None:
    folder = tmp_path / "out put"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights 'q'").write_bytes(os.urandom(2 * MIB + 1))
    (folder / "deep" / "empty").touch()
    sent: list[int] = []
    path = device.push(folder, progress=lambda done, total: sent.append(done))
    assert sent[0] == 0 and sent[-1] == 2 * MIB + 1
    device.pull(f"{path}/weights 'q'", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (folder / "weights 'q'").read_bytes()

    sent.clear()
    assert device.push(folder, progress=lambda done, total: sent.append(done)) == path
    assert sent == [2 * MIB + 1]

    # A file that went away here goes away there; one that changed there is sent again.
    (folder / "deep" / "empty").unlink()
    device.sh(f"echo more >>\"{path}/weights 'q'\"")
    device.push(folder)
    device.pull(f"{path}/weights 'q'", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (folder / "weights 'q'").read_bytes()
    assert device.sh(f"find '{path}' -type f").count("\n") == 1


def test_a_part_of_something_else_is_not_continued(device: ShellDevice, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"a" * 1000)
    path = device.push(source)
    device.sh(f"rm {path} && printf bbbb >{path}.part")
    device.push(source)
    device.pull(path, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_disk_that_is_too_small_is_told_before_sending(small_device: ShellDevice, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(20 * MIB))
    with pytest.raises(DeviceError, match=r"no space left in .* \(20 MiB to send, .* free\)"):
        small_device.push(tmp_path / "big")


def test_a_disk_that_fills_up_leaves_no_part(small_device: ShellDevice, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(3 * MIB))
    filler, free = f"{small_device.root}/filler", small_device.probe().free_bytes

    def fill(done: int, total: int) -> None:
        if done == 0:
            small_device.answer(f"head -c {free - MIB} /dev/zero >{filler}")

    with pytest.raises(DeviceError, match="no space left"):
        small_device.push(tmp_path / "big", progress=fill)
    assert small_device.sh(f"rm {filler}; find {small_device.root}/files -name 'big*'") == ""


def test_a_full_disk_does_not_lose_a_run(small_device: ShellDevice) -> None:
    small_device.answer(f"cat /dev/zero >{small_device.root}/filler")
    run = small_device.run(["sh", "-c", "sleep 0.3; echo done"], timeout=60, interval=0.1)
    small_device.sh(f"rm {small_device.root}/filler")
    assert (run.exit_code, run.stdout) == (0, "done\n")


def test_a_full_disk_is_told_when_connecting(server: Server, small_device: ShellDevice) -> None:
    small_device.answer(f"rm -f {small_device.root}/supervise.sh; cat /dev/zero >{small_device.root}/filler")
    with pytest.raises(DeviceError, match="no space left in"):
        open_device(server.small)
    small_device.sh(f"rm {small_device.root}/filler")
    with open_device(server.small) as device:
        assert device.run(["true"], timeout=60).exit_code == 0


def test_push_and_pull_of_nothing(device: ShellDevice, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        device.push(tmp_path / "nothing")
    with pytest.raises(DeviceError, match="No such file"):
        device.pull("/no/such/file", tmp_path / "back")
    assert not list(tmp_path.iterdir())


# Facts.


def test_probe(device: ShellDevice) -> None:
    facts = device.probe()
    assert facts.spec == device.spec and facts.kind == device.kind
    assert facts.arch == os.uname().machine
    assert facts.kernel == os.uname().release
    assert facts.cores == os.cpu_count()
    assert facts.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < facts.memory_available_bytes < facts.memory_bytes
    assert facts.free_bytes > 0
    assert facts.big_cores


def test_cool_down_is_capped(device: ShellDevice) -> None:
    assert not cool_down(device, to_c=-200, cap_s=0.2, interval=0.1)


# Deaths of the daemon: last, for the connection above does not survive them.


def test_death_of_the_connection_ends_it_there(server: Server, number: str) -> None:
    with open_device(server.spec) as device:
        thread = when_running(number, server.kill)
        try:
            with pytest.raises(DeviceError, match=r"sleep was lost: "):
                device.run(["sleep", number], timeout=60)
            thread.join()
            gone(number)
        finally:
            server.revive()


def test_a_device_that_went_away_is_an_error_of_every_call(server: Server, tmp_path: Path) -> None:
    with open_device(server.spec) as device:
        server.kill()
        try:
            with pytest.raises(DeviceError, match="connection"):
                device.probe()
            with pytest.raises(DeviceError, match="connection"):
                device.pull("/proc/version", tmp_path / "version")
            assert not list(tmp_path.iterdir())
        finally:
            server.revive()


def test_an_interrupted_push_is_continued(server: Server, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(os.urandom(3 * MIB))
    sent: list[int] = []

    def dies_half_way(done: int, total: int) -> None:
        if done == MIB:
            wait_for(
                lambda: (
                    device.answer(f"stat -c %s {device.root}/files/*/weights.part").text.strip() == str(MIB)
                ),
                "the first piece did not arrive",
            )
            server.kill()

    with open_device(server.spec) as device:
        assert isinstance(device, ShellDevice)
        try:
            with pytest.raises(DeviceError, match="connection"):
                device.push(source, progress=dies_half_way)
        finally:
            server.revive()
    with open_device(server.spec) as device:
        path = device.push(source, progress=lambda done, total: sent.append(done))
        assert sent[0] == MIB
        device.pull(path, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == source.read_bytes()
