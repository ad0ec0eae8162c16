"""`gemma-edge bench` on devices: a real sshd on loopback, a fleet, and what the native program reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.measure import target
from gemma_edge.benchmarks.measure.native_runner import NativeRun, native_report
from gemma_edge.benchmarks.measure.target import DeviceTarget, NativeTarget
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.records.bundle_facts import bundle_facts
from gemma_edge.benchmarks.records.measurement import KernelTest, TurnSizes
from gemma_edge.benchmarks.records.run_report import MemoryReport, RunReport
from gemma_edge.cli.main import main
from gemma_edge.devices import DeviceFacts, open_device
from gemma_edge.devices.machine import limit
from gemma_edge.devices.machine.cgroup import LimitedRun, mechanism
from gemma_edge.devices.machine.child import ChildError, ChildRun, run_child
from gemma_edge.devices.machine.memory import MemoryPoints, MemorySample, PeakMemory
from gemma_edge.devices.machine.sensors import Sensors
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.typed_json import from_json, to_json
from support.device_servers import sshd_missing
from support.results import read_rows

limited = pytest.mark.skipif(mechanism().name == "none", reason=f"no kernel limit: {mechanism().reason}")
QUICK = ["-p", "16", "-n", "4", "-r", "2", "--no-cold", "--requests", "0", "--bandwidth", "0s"]


def test_device_behind_ssh_is_measured_like_this_machine(
    device_url: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    argv = ["bench", str(tiny_bundle), "-p", "16", "-n", "4", "-r", "2", "--bandwidth", "0.05s"]
    argv += ["--requests", "1", "--prompt", "40", "--tokens", "3", "--device", device_url, "-o", str(path)]
    assert main(argv) == 0
    *tests, session = read_rows(path)
    assert [row["test"] for row in tests] == ["pp16", "tg4"]
    assert {row["device"] for row in (*tests, session)} == {device_url}
    assert session["device_facts"]["kind"] == "ssh" and session["device_facts"]["cores"] >= 1
    assert session["load"]["cold_s"] > 0 and session["latency"]["requests"] == 1
    assert tests[1]["bandwidth_share"] > 0 and len(session["memory"]["timeline"]["seconds"]) > 1
    assert session["workload"]["threads"] == len(session["device_facts"]["big_cores"])


def test_a_device_behind_ssh_is_planned_for(
    device_url: str,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("gemma_edge.benchmarks.measure.planned_machine.PROBE_SECONDS", 0.05)
    assert main(["plan", str(tiny_checkpoint), "--device", device_url, "--context", "64"]) == 0
    out = capsys.readouterr().out
    assert "GB/s (measured now)" in out and out.splitlines()[-1].startswith("gemma-edge export ")


@limited
def test_ceiling_is_enforced_on_a_device_that_lets_us(
    device_url: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    argv = ["bench", str(tiny_bundle), *QUICK, "--device", device_url, "-o", str(path)]
    assert main([*argv, "--ceiling", "600MiB", "--control", "12MiB"]) == 0
    ceiling = read_rows(path)[-1]["ceiling"]
    assert ceiling["enforced"] and ceiling["control_killed"]


def test_device_that_is_gone_is_exit_4(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if reason := sshd_missing():
        pytest.skip(reason)
    assert main(["bench", str(tiny_bundle), *QUICK, "--device", "ssh://nobody@127.0.0.1:9"]) == 4
    said = capsys.readouterr()
    assert "ssh://nobody@127.0.0.1:9" in said.err
    assert said.out == "" and "" not in said.err.splitlines()  # no empty line


def test_fleet_merges_what_its_devices_measured_and_reports_who_failed(
    device_url: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet, path = tmp_path / "fleet.toml", tmp_path / "r.jsonl"
    tables = ['name = "here"\nspec = "local"\nthreads = 1', f'name = "there"\nspec = "{device_url}"']
    tables.append('name = "gone"\nspec = "ssh://nobody@127.0.0.1:9"')
    fleet.write_text("\n".join(f"[[device]]\n{table}" for table in tables))
    argv = ["bench", str(tiny_bundle), *QUICK, "--fleet", str(fleet), "-o", f"md,{path}"]
    assert main(argv) == 4
    rows = read_rows(path)
    assert {(row["device"], row["kind"]) for row in rows} == {
        (name, kind) for name in ("here", "there") for kind in ("bench", "session")
    }
    assert len({row["run"] for row in rows}) == 1
    assert {row["n_threads"] for row in rows if row["device"] == "here" and row["kind"] == "bench"} == {1}
    captured = capsys.readouterr()
    assert "| device | model |" in captured.out
    assert "1 of 3 devices failed: gone" in captured.err


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("speed = 1", "speed"),
        ("threads = 0", "threads"),
        ("bundle = 3", "bundle"),
        ('cool_to_c = "x"', "cool_to_c"),
    ],
)
def test_fleet_file_with_an_unknown_or_wrong_key(
    table: str, problem: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[[device]]\nspec = "local"\n{table}\n')
    assert main(["bench", str(tiny_bundle), *QUICK, "--fleet", str(fleet)]) == 2
    assert problem in capsys.readouterr().err


# The limit on a device --------------------------------------------------------------------------------


def child(stdout: str, exit_code: int = 0) -> ChildRun:
    return ChildRun(exit_code, stdout, "last words", 1.0, PeakMemory())


@limited
def test_limited_run_crosses_a_device() -> None:
    argv = limit.limit_argv(sys.executable, 64 * 2**20, 60, [sys.executable, "-c", "print('x' * 5)"])
    run = run_child(argv, timeout=300).parse(LimitedRun, "the run")
    assert (run.stdout, run.exit_code, run.killed, run.limit_bytes) == ("xxxxx\n", 0, False, 64 * 2**20)
    hold = [sys.executable, "-c", "x = b'x' * (200 << 20)"]
    held = run_child(limit.limit_argv(sys.executable, 64 * 2**20, 60, hold))
    assert held.parse(LimitedRun, "the run").killed
    probe = run_child(limit.probe_argv(sys.executable)).parse(limit.LimitProbe, "the probe")
    assert probe == limit.LimitProbe(mechanism().name, "")


@pytest.mark.parametrize("stdout", ["", "[]", "x", "{}", '{"peak": 3}'])
def test_limited_run_without_a_result(stdout: str) -> None:
    with pytest.raises(DeviceError, match="printed no report"):
        child(stdout).parse(LimitedRun, "the run")
    with pytest.raises(ChildError, match="last words"):
        child("", exit_code=3).parse(limit.LimitProbe, "the probe")


# The native program -----------------------------------------------------------------------------------

FACTS: dict[str, Any] = {
    "spec": "adb:X", "kind": "adb", "name": "Pixel", "system": "Android", "release": "14", "kernel": "6.1",
    "arch": "aarch64", "cpu": "Tensor", "cpu_flags": ("atomics",), "cores": 8, "core_khz": (),
    "big_cores": (6, 7), "governors": (), "memory_bytes": 8 * 2**30, "memory_available_bytes": 2**30,
    "free_bytes": 2**30,
    "temperature_c": 31.5, "thermal_status": 0, "battery_percent": 80, "battery_c": 30.0, "on_power": True,
    "python": None, "libc": "bionic",
}  # fmt: skip


def native(n_prompt: int, n_gen: int, anon: int) -> NativeRun:
    points = MemoryPoints([0.0, 0.1, 0.2], [anon] * 3, [5] * 3)
    peak = PeakMemory(rss_anon=anon, rss_file=5, rss=anon + 5, high_water=anon + 9)
    return NativeRun(
        sizes=TurnSizes(n_prompt, n_gen, 2, 2, 256),
        load_s=1.5,
        tests=(KernelTest(n_prompt, 0, (10**9,) * 2), KernelTest(0, n_gen, (2 * 10**9,) * 2, n_prompt)),
        ttft_ms=(1000.0, 1200.0),
        memory=MemoryReport(MemorySample(anon, 5), peak, timeline=points),
        cores=(6, 7),
    )


def test_native_runs_become_one_report() -> None:
    runs = [native(64, 8, 100), native(128, 8, 300)]
    report = native_report(runs, DeviceFacts(**FACTS), Sensors(), Sensors(temperature_c=40.0))
    assert [test.n_prompt or test.n_gen for test in report.tests] == [64, 8, 128, 8]
    assert [test.n_depth for test in report.tests] == [0, 64, 0, 128]
    assert report.latency and report.latency.ttft_ms.p50 == 1000.0 and report.latency.itl_ms is None
    assert report.memory and report.memory.timeline
    assert report.memory.peak.rss_anon == 300, "of the run that needed most"
    assert report.memory.timeline.rss_anon == [300] * 3
    assert report.environment.cpu == "Tensor" and report.notes == ("bound to cores 6, 7",)
    assert from_json(RunReport, json.loads(json.dumps(to_json(report), allow_nan=False))) == report


class Phone:
    """A device as far as `NativeTarget` asks it."""

    spec = "adb:X"

    facts = DeviceFacts(**FACTS)

    def temperature(self) -> float:
        return 31.5


def test_native_target_measures_every_pair_of_sizes(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def bench_native(_: object, model: Path, sizes: Any, *, timeout: float, cores: Any) -> NativeRun:
        seen.append((model, sizes.n_prompt, sizes.n_gen, sizes.context, cores))
        return native(sizes.n_prompt, sizes.n_gen, 100)

    monkeypatch.setattr(target, "bench_native", bench_native)
    phone: Any = Phone()
    there = NativeTarget(phone, tiny_bundle, bundle_facts(tiny_bundle))
    outcome = there.work(Workload(prompts=(16, 32), gens=(4,)), None, 60)
    assert seen == [(tiny_bundle, n, 4, 256, (6, 7)) for n in (16, 32)]
    assert outcome.report is not None and len(outcome.report.tests) == 4
    with pytest.raises(UsageError, match="-d"):
        there.work(Workload(prompts=(16,), gens=(4,), depths=(0, 8)), None, 60)


def test_targets_close_nothing_they_did_not_open(device_url: str, tiny_bundle: Path) -> None:
    with open_device(device_url) as device:
        assert DeviceTarget(device, tiny_bundle).enforces == (mechanism().name != "none")
        assert device.run(["true"], timeout=60).exit_code == 0
