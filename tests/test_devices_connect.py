"""Finding a device, and being refused by it; what only one kind of device does."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_edge.devices import DeviceRun, open_device
from gemma_edge.devices.adb import AdbDevice
from gemma_edge.devices.base import signal_name
from gemma_edge.devices.facts import parse_facts, parse_meminfo
from gemma_edge.devices.machine.memory import PeakMemory
from gemma_edge.runtime.errors import DeviceError, UsageError
from support.device_servers import DUMPSYS, Adbd, Sshd, adbd_missing, sshd_missing
from support.processes import wait_for

PHONE = f"""\
### uname
Linux
5.15.123-android13-8
aarch64
localhost
### os-release
### getprop
[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 8]
[ro.build.version.release]: [14]
### cpuinfo
processor	: 0
Features	: fp asimd atomics asimddp i8mm
processor	: 1
Features	: fp asimd atomics asimddp i8mm
processor	: 2
Features	: fp asimd atomics asimddp i8mm
### meminfo
MemTotal:        7700000 kB
MemAvailable:    3100000 kB
### frequency
/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq:1704000
/sys/devices/system/cpu/cpu1/cpufreq/cpuinfo_max_freq:2367000
/sys/devices/system/cpu/cpu2/cpufreq/cpuinfo_max_freq:2914000
### governor
/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor:sched_pixel
### df
Filesystem     1024-blocks    Used Available Capacity Mounted on
/dev/block/dm-46  113000000 80000000 33000000      71% /data/user/0
### python
### libc
### thermalservice
{DUMPSYS["thermalservice"]}### battery
{DUMPSYS["battery"]}"""

PI = """\
### uname
Linux
6.6.31+rpt-rpi-2712
aarch64
raspberrypi
### os-release
PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"
### cpuinfo
processor	: 0
Features	: fp asimd evtstrm aes crc32 atomics asimdhp asimddp
Revision	: d04170
### frequency
/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq:2400000
### governor
/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor:ondemand
### thermal
/sys/class/thermal/thermal_zone0/type:cpu-thermal
/sys/class/thermal/thermal_zone0/temp:52350
/sys/class/thermal/thermal_zone1/type:ddr
/sys/class/thermal/thermal_zone1/temp:99000
### model
Raspberry Pi 5 Model B Rev 1.0\0
### python
3.11.2
### libc
glibc 2.36
"""


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    if reason := sshd_missing():
        pytest.skip(reason)
    server = Sshd(tmp_path)
    server.start()
    monkeypatch.setenv("GEMMA_EDGE_SSH_CONFIG", str(server.config))
    yield server
    server.kill()


@pytest.fixture
def adb_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An adb server of our own, without devices."""
    if shutil.which("adb") is None:
        pytest.skip("no adb")
    monkeypatch.setenv("ADB_SERVER_SOCKET", f"localfilesystem:{tmp_path}/adb")
    with (tmp_path / "adb.log").open("wb") as log:
        server = subprocess.Popen(
            ["adb", "server", "nodaemon"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    wait_for(lambda: (tmp_path / "adb").exists(), "adb does not start")
    yield
    server.kill()
    server.wait()


# Specs.


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "usb",
        "ssh://",
        "ssh://-oProxyCommand=x",
        "ssh://pi:secret@host",
        "ssh://host:port",
        "ssh://host:99999",
    ],
)
def test_a_spec_that_is_none(spec: str) -> None:
    with pytest.raises(UsageError):
        open_device(spec)


# ssh.


def test_nobody_listens(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(DeviceError, match="nothing listens there"):
            open_device(f"ssh://127.0.0.1:{closed.getsockname()[1]}")


def test_a_host_that_is_not_known_by_name(sshd: Sshd) -> None:
    with pytest.raises(DeviceError, match="no such host name"):
        open_device("ssh://no-such-host.invalid")


def test_a_key_that_is_refused(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_EDGE_SSH_CONFIG", str(sshd.ssh_config("other_key")))
    with pytest.raises(DeviceError, match="refuses our key: ssh-copy-id"):
        open_device(sshd.url)


def test_a_host_key_that_has_changed(sshd: Sshd) -> None:
    other = (sshd.folder / "other_key.pub").read_text()
    (sshd.folder / "known_hosts").write_text(f"[127.0.0.1]:{sshd.port} {other}")
    with pytest.raises(DeviceError, match="its host key is not known, or has changed"):
        open_device(sshd.url)


def test_no_connection_is_left(sshd: Sshd) -> None:
    with open_device(f"{sshd.url}{sshd.folder}/device") as device:
        device.probe()
    device.close()
    wait_for(lambda: not sshd.connections(), "a connection was left")


def test_no_ssh_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="ssh is not installed"):
        open_device("ssh://host")
    with pytest.raises(DeviceError, match="adb is not installed"):
        open_device("adb")


# adb.


def test_no_device(adb_server: None) -> None:
    with pytest.raises(DeviceError, match="adb: no device; plug one in"):
        open_device("adb")
    with pytest.raises(DeviceError, match="adb:R3CN: no such device; adb devices lists: none"):
        open_device("adb:R3CN")


def test_an_unauthorised_device(adb_server: None) -> None:
    with refusing_device() as address, pytest.raises(DeviceError, match="accept this computer's key"):
        open_device(f"adb:{address}")


def test_several_devices_and_none_chosen(adb_server: None) -> None:
    with refusing_device() as one, refusing_device() as other:
        for address in (one, other):
            subprocess.run(["adb", "connect", address], capture_output=True)
        with pytest.raises(DeviceError, match=r"several devices; choose adb:127.* or adb:127"):
            open_device("adb")


def test_an_address_where_nothing_is(adb_server: None) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(DeviceError, match="failed to connect"):
            open_device(f"adb:{address}")


def test_android_keeps_the_screen_on_and_counts_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := adbd_missing():
        pytest.skip(reason)
    adbd = Adbd(tmp_path)
    try:
        for name, value in adbd.environment.items():
            monkeypatch.setenv(name, value)
        spec = f"adb:{adbd.SERIAL}"
        with open_device(spec) as device:
            assert isinstance(device, AdbDevice)
            setting = "cat /data/shim/stayon"
            with device.awake():
                assert device.sh(setting) == "7\n"
            assert device.sh(setting) == "0\n"

            # Gone in the meantime: restored by the next connection.
            with device.awake():
                adbd.kill()
        adbd.revive()
        with open_device(spec) as device:
            assert isinstance(device, AdbDevice)
            assert device.sh(setting) == "0\n"

            facts = device.probe()
            assert (facts.system, facts.release) == ("Android", "Android 14")
            assert (facts.temperature_c, facts.thermal_status) == (61.2, 1)
            assert (facts.battery_percent, facts.battery_c, facts.on_power) == (83, 29.1, True)
            assert device.meminfo("4321") == {"pss": 82944 * 1024, "rss": 101376 * 1024}
            with pytest.raises(DeviceError, match="Android has no Python"):
                device.python()
    finally:
        adbd.close()


@contextlib.contextmanager
def refusing_device() -> Iterator[str]:
    """The address of a daemon that wants a key that nobody has: AOSP's protocol, up to there."""

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, struct.error):
            while True:
                command, _, _, size, _, _ = struct.unpack("<6I", connection.recv(24, socket.MSG_WAITALL))
                connection.recv(size, socket.MSG_WAITALL)
                # A token to sign; and a public key, the last that a client tries, is left unanswered.
                token, auth = os.urandom(20), int.from_bytes(b"AUTH", "little")
                if command == int.from_bytes(b"CNXN", "little") or size == 256:
                    head = struct.pack("<6I", auth, 1, 0, len(token), sum(token), auth ^ 0xFFFFFFFF)
                    connection.sendall(head + token)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


# What devices say of themselves.


def test_facts_of_a_phone() -> None:
    facts = parse_facts(PHONE, spec="adb", kind="adb")
    assert (facts.name, facts.system, facts.arch) == ("Google Pixel 8", "Android", "aarch64")
    assert (facts.cores, facts.big_cores, facts.core_khz) == (3, (2,), (1704000, 2367000, 2914000))
    assert facts.cpu_flags == ("asimd", "asimddp", "i8mm", "atomics")
    assert (facts.memory_bytes, facts.free_bytes) == (7700000 * 1024, 33000000 * 1024)
    assert (facts.temperature_c, facts.battery_percent, facts.on_power) == (61.2, 83, True)
    assert (facts.libc, facts.python) == ("bionic", None)


def test_facts_of_a_board() -> None:
    facts = parse_facts(PI, spec="ssh://pi", kind="ssh")
    assert (facts.name, facts.cpu) == ("raspberrypi", "Raspberry Pi 5 Model B Rev 1.0")
    assert facts.release == "Debian GNU/Linux 12 (bookworm)"
    # The memory's sensor is hotter, and not what throttles.
    assert facts.temperature_c == 52.4
    assert (facts.governors, facts.big_cores) == (("ondemand",), (0,))
    assert (facts.libc, facts.python, facts.on_power) == ("glibc 2.36", "3.11.2", None)


def test_facts_of_a_device_that_tells_nothing() -> None:
    facts = parse_facts("", spec="adb", kind="adb")
    assert (facts.cores, facts.memory_bytes, facts.temperature_c, facts.battery_percent) == (0, 0, None, None)
    assert len(facts.notes) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DUMPSYS["meminfo"], {"pss": 82944 * 1024, "rss": 101376 * 1024}),
        ("  TOTAL   82944   79000   1200\n", {"pss": 82944 * 1024}),
        ("No process found for: 1\n", {}),
    ],
    ids=["Android 14", "Android 9", "no process"],
)
def test_meminfo(text: str, expected: dict[str, int]) -> None:
    assert parse_meminfo(text) == expected


def test_a_signal_has_a_name() -> None:
    assert "SIGKILL" in signal_name(137) and "memory" in signal_name(137)
    assert signal_name(139) == "signal 11 (SIGSEGV)"
    assert signal_name(255) == "signal 127"
    run = DeviceRun(0, "out", "", 1.0, PeakMemory())
    assert run.check("it") is run
