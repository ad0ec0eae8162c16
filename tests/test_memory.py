"""Memory as /proc tells it, a cold page cache, and runs under a limit that the kernel enforces."""

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_edge.devices.machine import cgroup, memory
from gemma_edge.devices.machine.cgroup import mechanism, run_limited
from gemma_edge.devices.machine.child import run_child
from gemma_edge.devices.machine.memory import MemorySample, drop_page_cache, read_memory
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.host.process_memory import ResidentMemory, resident_memory
from support.processes import PATIENCE_S, ended, wait_for

MB = 2**20
ALLOCATE = "import sys; x = b'x' * (int(sys.argv[1]) << 20); print('held', len(x) >> 20)"
READ_MAPPED = """
import mmap, sys
with open(sys.argv[1], 'rb') as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
    print('read', sum(m[i] == 0 for i in range(0, len(m), 4096)))
"""

limited = pytest.mark.skipif(mechanism().name == "none", reason=f"no kernel limit: {mechanism().reason}")


# /proc ------------------------------------------------------------------------------------------------


# Each in a process of its own: that of the tests gives back what other tests left.
IN_A_CHILD = """
import dataclasses, json, mmap, sys
from gemma_edge.devices.machine.memory import read_memory

before = read_memory()
{hold}
print(json.dumps([dataclasses.asdict(before), dataclasses.asdict(read_memory())]))
"""
HOLD_BYTES = "held = b'x' * int(sys.argv[1])"
HOLD_MAPPED = """
file = open(sys.argv[1], "rb")
held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
assert sum(held[i] for i in range(0, len(held), 4096)) > 0
"""


def before_and_after(hold: str, argument: str) -> list[MemorySample]:
    """The memory of a process before and after it holds something."""
    argv = [sys.executable, "-c", IN_A_CHILD.format(hold=hold), argument]
    run = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    return [MemorySample(**sample) for sample in json.loads(run.stdout)]


def test_anonymous_memory_is_rss_anon() -> None:
    before, after = before_and_after(HOLD_BYTES, str(64 * MB))
    assert 60 * MB < after.rss_anon - before.rss_anon < 72 * MB
    assert abs(after.rss_file - before.rss_file) < 8 * MB
    assert after.rss == after.rss_anon + after.rss_file + after.rss_shmem
    assert after.pss is not None and after.pss <= after.rss * 1.01


def test_mapped_file_is_rss_file(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(os.urandom(MB) * 32)
    before, after = before_and_after(HOLD_MAPPED, str(path))
    assert 30 * MB < after.rss_file - before.rss_file < 40 * MB
    assert after.rss_anon - before.rss_anon < 8 * MB


def test_memory_of_no_process_is_an_error() -> None:
    with pytest.raises(DeviceError, match="process 99999999"):
        read_memory(99999999)


SAMPLED = """
import time
from gemma_edge.devices.machine.memory import PeakSampler, read_memory

before = read_memory().rss_anon
with PeakSampler(interval=0.002) as sampler:
    block = b"x" * (96 << 20)
    seen = sampler.peak.samples
    while sampler.peak.samples < seen + 6:
        time.sleep(0.002)
    del block
peak = sampler.peak
print(peak.rss_anon - before, read_memory().rss_anon - before, peak.high_water - peak.rss, peak.samples)
"""


def test_peak_sampler_sees_memory_that_is_gone_again() -> None:
    argv = [sys.executable, "-c", SAMPLED]
    run = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    peak, after, above, samples = map(int, run.stdout.split())
    assert peak > 90 * MB > 48 * MB > after
    assert above >= 0 and samples > 5


def test_peak_of_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"

    def look(pid: memory.Pid, proc: Path) -> ResidentMemory:
        held = resident_memory(pid, proc)
        if held.anon > 100 * MB:
            seen.touch()  # until then the child holds on to it
        return held

    monkeypatch.setattr(memory, "resident_memory", look)
    hold = "import os, time\nwhile not os.path.exists(sys.argv[2]): time.sleep(0.01)"
    argv = [sys.executable, "-c", f"{ALLOCATE}\n{hold}", "100", str(seen)]
    run = run_child(argv, interval=0.01, timeout=PATIENCE_S)
    assert run.stdout == "held 100\n"
    assert 100 * MB < run.peak.rss_anon < 150 * MB


def test_child_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    for timeout in (0.3, 3, 30):  # a busy machine may not start it in time
        with pytest.raises(DeviceError, match=f"sh did not finish within {timeout:g} s"):
            run_child(["sh", "-c", f"sleep 600 & echo $! > {pid_file}; wait"], timeout=timeout)
        if pid_file.exists():
            break
    grandchild = int(pid_file.read_text())
    wait_for(lambda: ended(grandchild), "left running")


def test_child_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(DeviceError, match="no-such-program cannot be started"):
        run_child(["no-such-program"])


def test_drop_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "cached"
    path.write_bytes(os.urandom(MB) * 8)
    (tmp_path / "empty").touch()
    if remaining := drop_page_cache([path, tmp_path / "empty"]):
        pytest.skip(f"this file system keeps pages: {remaining} bytes are still cached")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[i] for i in range(0, len(mapped), 4096)) > 0
        assert drop_page_cache([path]) == 8 * MB, "pages that are mapped cannot be dropped, and that is said"


# Kernel limits ------------------------------------------------------------------------------------------


@limited
def test_anonymous_memory_above_the_limit_is_killed() -> None:
    run = run_limited([sys.executable, "-c", ALLOCATE, "400"], 300 * MB, timeout=PATIENCE_S)
    assert run.killed and run.exit_code == 137
    assert run.stdout == ""
    assert run.peak_bytes is None or 295 * MB < run.peak_bytes <= 300 * MB


@limited
def test_mapped_file_above_the_limit_passes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        file.truncate(600 * MB)  # holes are cached pages like any other once they are read
    run = run_limited([sys.executable, "-c", READ_MAPPED, str(path)], 300 * MB, timeout=PATIENCE_S)
    assert not run.killed and run.exit_code == 0, run.stderr
    assert run.stdout == f"read {600 * MB // 4096}\n"
    assert run.peak_bytes is None or run.peak_bytes <= 300 * MB


@limited
def test_failure_below_the_limit_is_not_a_kill() -> None:
    run = run_limited(["sh", "-c", "echo broken >&2; exit 3"], 300 * MB, timeout=PATIENCE_S)
    assert (run.killed, run.exit_code, run.last_line()) == (False, 3, "broken")


@limited
def test_sigkill_from_elsewhere_is_not_a_kill_by_the_kernel() -> None:
    run = run_limited(["sh", "-c", "kill -9 $$"], 300 * MB, timeout=PATIENCE_S)
    assert (run.killed, run.exit_code) == (False, 137)


@limited
def test_limited_run_gets_its_arguments_and_environment() -> None:
    run = run_limited(
        ["sh", "-c", 'echo "$1|$WORD"', "sh", "a  b"], 300 * MB, env={"WORD": "c d"}, timeout=60
    )
    assert run.stdout == "a  b|c d\n"


@limited
def test_no_group_is_left_after_a_timeout() -> None:
    with pytest.raises(DeviceError, match=r"sleep did not finish within 0\.3 s"):
        run_limited(["sleep", "60"], 300 * MB, timeout=0.3)
    assert _groups(os.getpid()) == []


@limited
def test_no_group_and_no_process_is_left_after_ctrl_c() -> None:
    module = "gemma_edge.devices.machine.cgroup"
    code = f"from {module} import run_limited; run_limited(['sleep', '60'], 300 << 20)"
    runner = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        sleeper = _wait_for_command(runner.pid, "sleep")
        runner.send_signal(signal.SIGINT)
        assert runner.wait(timeout=PATIENCE_S) != 0
    finally:
        runner.kill()
    wait_for(lambda: ended(sleeper), "left running")
    assert _groups(runner.pid) == []


def test_without_a_mechanism_the_reason_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "mechanism", lambda: cgroup.Mechanism("none", "permission denied"))
    with pytest.raises(DeviceError, match="cannot be enforced here: permission denied"):
        run_limited(["true"], 300 * MB)


def test_v1_group_is_nested_in_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_proc(tmp_path, monkeypatch, "5:memory:/user/me\n0::/\n", "cgroup cgroup rw,memory", root="/")
    assert list(cgroup._candidates()) == [("cgroup-v1", tmp_path / "mount/user/me")]


def test_v1_in_a_container_sees_only_its_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_proc(tmp_path, monkeypatch, "5:memory:/docker/1/sub\n", "cgroup cgroup rw,memory", root="/docker/1")
    assert list(cgroup._candidates()) == [("cgroup-v1", tmp_path / "mount/sub")]


def test_v2_group_is_below_the_nearest_that_delegates_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_proc(tmp_path, monkeypatch, "0::/user.slice/session.scope\n", "cgroup2 cgroup2 rw", root="/")
    scope = tmp_path / "mount/user.slice/session.scope"
    scope.mkdir(parents=True)
    for folder, controllers in (
        (scope, ""),
        (scope.parent, "cpu memory"),
        (tmp_path / "mount", "cpu memory"),
    ):
        (folder / "cgroup.subtree_control").write_text(controllers)
    assert list(cgroup._candidates()) == [("cgroup-v2", scope.parent)]


def test_v2_without_the_memory_controller_is_no_mechanism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_proc(tmp_path, monkeypatch, "0::/\n", "cgroup2 cgroup2 rw", root="/")
    (tmp_path / "mount").mkdir()
    (tmp_path / "mount/cgroup.subtree_control").write_text("")
    assert list(cgroup._candidates()) == []
    cgroup.mechanism.cache_clear()
    try:
        assert cgroup.mechanism().name == "none"
    finally:
        cgroup.mechanism.cache_clear()


def _fake_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, mount: str, root: str) -> None:
    (tmp_path / "cgroup").write_text(groups)
    (tmp_path / "mountinfo").write_text(
        f"31 24 0:27 / / rw - ext4 /dev/vda rw\n35 31 0:30 {root} {tmp_path}/mount rw shared:9 - {mount}\n"
    )
    monkeypatch.setattr(cgroup, "PROC_SELF", tmp_path)


def _groups(pid: int) -> list[Path]:
    parent = mechanism().parent
    assert parent is not None
    return list(parent.glob(f"gemma-edge-{pid}-*"))


def _wait_for_command(parent: int, command: str) -> int:
    """The id of a process named `command` in a control group that `parent` made, once it runs."""
    found: list[int] = []

    def look() -> list[int]:
        with contextlib.suppress(OSError):  # a group or a process that has just gone
            for group in _groups(parent):
                for pid in (group / "cgroup.procs").read_text().split():
                    if Path(f"/proc/{pid}/comm").read_text().strip() == command:
                        found.append(int(pid))
        return found

    wait_for(look, f"{command} was never started")
    return found[0]
