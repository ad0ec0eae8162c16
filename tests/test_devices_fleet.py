"""Several devices at once, and a device that has no gemma-edge yet."""

from __future__ import annotations

import os
import signal
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_edge.benchmarks.measure.worker import worker_argv
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.records.run_report import RunReport
from gemma_edge.devices import Device, Member, Outcome, open_device, read_fleet, run_fleet
from gemma_edge.devices.fleet import FleetError
from gemma_edge.devices.install import Needs, platform_tags, write_wheel
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.version import __version__
from support.device_servers import Sshd, sshd_missing
from support.processes import sleeping, wait_for


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if reason := sshd_missing():
        pytest.skip(reason)
    server, patch = Sshd(tmp_path_factory.mktemp("sshd")), pytest.MonkeyPatch()
    server.start()
    patch.setenv("GEMMA_EDGE_SSH_CONFIG", str(server.config))
    yield server
    server.kill()
    patch.undo()


# Fleets.


def test_a_fleet_file(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    pi = '[[device]]\nname = "pi5"\nspec = "ssh://pi@raspberrypi"\nbundle = "out"\n'
    path.write_text(pi + '[[device]]\nspec = "adb:R3CN"\n')
    assert read_fleet(path) == [
        Member("pi5", "ssh://pi@raspberrypi", {"bundle": "out"}),
        Member("adb:R3CN", "adb:R3CN", {}),
    ]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[[device", "file"),
        ("", "device: expected tables"),
        ("device = 3", "device: expected tables"),
        ('[[device]]\nname = "pi"', "device 1: spec"),
        ('[[device]]\nspec = "local"\nname = 3', "device 1: name"),
        ('[[device]]\nspec = "local"\n[[device]]\nspec = "local"\nname = "b"', "device 2: expected a name"),
    ],
)
def test_a_fleet_file_that_cannot_be_used(tmp_path: Path, text: str, field: str) -> None:
    (tmp_path / "fleet.toml").write_text(text)
    with pytest.raises(FleetError, match=field) as error:
        read_fleet(tmp_path / "fleet.toml")
    assert error.value.exit_code == 2


def test_no_fleet_file(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"fleet\.toml"):
        read_fleet(tmp_path / "fleet.toml")


def test_a_fleet_works_side_by_side_and_one_failure_is_its_own(sshd: Sshd) -> None:
    meeting = threading.Barrier(2, timeout=300)
    members = [
        Member("here", "local", {"word": "a"}),
        Member("gone", "ssh://no-such-host.invalid", {}),
        Member("there", f"{sshd.url}{sshd.folder}/fleet", {"word": "b"}),
    ]
    ended: list[str] = []

    def work(device: Device, member: Member) -> str:
        meeting.wait()  # both have to be at work for either to go on
        return device.run(["echo", member.options["word"]], timeout=300).stdout

    def done(outcome: Outcome[str]) -> None:
        ended.append(outcome.member.name)

    outcomes = run_fleet(members, work, done=done)
    assert [outcome.result for outcome in outcomes] == ["a\n", None, "b\n"]
    assert isinstance(outcomes[1].error, DeviceError)
    assert sorted(ended) == ["gone", "here", "there"]


def test_ctrl_c_ends_a_fleet(sshd: Sshd) -> None:
    number = str(50_000 + os.getpid())
    members = [Member("here", "local", {}), Member("there", f"{sshd.url}{sshd.folder}/fleet", {})]

    def interrupt() -> None:
        wait_for(lambda: len(sleeping(number)) == 2, "they never ran")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_fleet(members, lambda device, member: device.run(["sleep", number], timeout=300))
    thread.join()
    wait_for(lambda: not sleeping(number), "left running")


# Installing.


def test_the_wheel_is_this_package(tmp_path: Path) -> None:
    path = write_wheel(tmp_path)
    first = path.read_bytes()
    assert write_wheel(tmp_path).read_bytes() == first
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        expected = (
            "__init__.py",
            "runtime/model.py",
            "devices/supervise.sh",
            "runtime/server/page/index.html",
        )
        assert {f"gemma_edge/{name}" for name in expected} <= set(names)
        assert not any(name.startswith("gemma_edge/pocket") or "/results/" in name for name in names)
        record = wheel.read(f"gemma_edge-{__version__}.dist-info/RECORD").decode()
    assert sorted(line.split(",")[0] for line in record.splitlines()) == sorted(names)


def test_what_an_environment_needs() -> None:
    names = [each.partition(">")[0] for each in Needs(("onnxruntime",), ("images",)).requirements()]
    assert {"onnxruntime", "numpy", "sentencepiece", "jinja2", "pillow"} == set(names)
    assert {"onnxruntime", "ai-edge-litert"} <= {each.partition(">")[0] for each in Needs().requirements()}
    with pytest.raises(UsageError, match="nothing-such"):
        Needs(extras=("nothing-such",)).requirements()


def test_platforms_of_a_device() -> None:
    with open_device("local") as device:
        facts = device.probe()
    pi = replace(facts, arch="aarch64", libc="glibc 2.36")
    tags = platform_tags(pi)
    assert tags[0] == "manylinux_2_36_aarch64"
    assert {"manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"} <= set(tags)
    for libc in ("musl", "bionic", None, "glibc 2.12"):
        with pytest.raises(DeviceError, match="wheel"):
            platform_tags(replace(facts, libc=libc))


def test_gemma_edge_is_installed_on_a_device(sshd: Sshd, tiny_bundle: Path) -> None:
    """As a plain install: all wheels come from here, and it measures a bundle there."""
    with open_device(f"{sshd.url}{sshd.folder}/device") as device:
        python = device.python()
        assert python.startswith(f"{sshd.folder}/device/python-")
        assert device.python() == python
        bundle = device.push(tiny_bundle)
        argv = worker_argv(python, bundle, Workload((8,), (2,), reps=1, threads=1, context=64))
        # Nothing of this environment may help.
        run = device.run(argv, timeout=300, env={"PYTHONPATH": ""})
        assert [test.test for test in run.parse(RunReport, "the worker").tests] == ["pp8", "tg2"]
        assert run.peak.rss > 10_000_000  # how far it had come at a sample depends on the machine
