"""The native runner, built and run: here, and through a real adbd; for Android, built and looked at."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from gemma_edge.benchmarks.measure.native_runner import NativeRun, bench_native, parse_runner
from gemma_edge.benchmarks.records.measurement import TurnSizes, by_test
from gemma_edge.devices import DeviceRun, open_device
from gemma_edge.devices.machine.child import ChildError
from gemma_edge.devices.machine.memory import PeakMemory
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.errors import DeviceError, UsageError
from support.device_servers import Adbd, adbd_missing
from support.native_build import build_runner

OPTIONS = TurnSizes(n_prompt=48, n_gen=8, reps=3, threads=1, context=128)


@pytest.fixture(scope="module")
def litertlm(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.litertlm"
    export_bundle(
        tiny_checkpoint, path, format="litertlm", verify=False, context=128, chunk=32, calibrate="none"
    )
    return path


def check(run: NativeRun) -> None:
    tests = by_test(run.tests)
    assert list(tests) == ["pp48", "tg8 @ d48"]
    assert all(len(test.samples_ns) == OPTIONS.reps for test in tests.values())
    # The first token comes after the prefill.
    waits = zip(run.ttft_ms, tests["pp48"].samples_ns, strict=True)
    assert all(first * 1e6 > ns for first, ns in waits)
    assert run.memory.steady.rss > 10_000_000
    assert run.memory.peak.high_water >= run.memory.steady.rss_anon


def test_on_this_machine(linux_runner: Path, litertlm: Path) -> None:
    with open_device("local") as device:
        report = bench_native(device, litertlm, OPTIONS, timeout=300, runner=linux_runner, cores=(0,))
    check(report)
    assert report.cores == (0,)
    assert list(litertlm.parent.glob("tiny.litertlm.cache/*xnnpack*"))


def test_through_adb(
    linux_runner: Path, litertlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := adbd_missing():
        pytest.skip(reason)
    adbd = Adbd(tmp_path, megabytes=256)
    try:
        for name, value in adbd.environment.items():
            monkeypatch.setenv(name, value)
        with open_device(f"adb:{adbd.SERIAL}") as device:
            check(bench_native(device, litertlm, OPTIONS, timeout=300, runner=linux_runner))
    finally:
        adbd.close()


def test_a_model_that_the_engine_refuses(linux_runner: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.litertlm").write_bytes(b"LITERTLM" + bytes(1000))
    with open_device("local") as device, pytest.raises(ChildError, match="the native runner") as error:
        bench_native(device, tmp_path / "broken.litertlm", OPTIONS, timeout=300, runner=linux_runner)
    assert error.value.exit_code == 3
    assert "broken.litertlm" in str(error.value)


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    model = tmp_path / "tiny.litertlm"
    model.touch()
    with open_device("local") as device:
        with pytest.raises(DeviceError, match=r"no gemma-bench in .* build it: .*build.sh linux"):
            bench_native(device, model, OPTIONS, timeout=60, runner=tmp_path / "nowhere")
        with pytest.raises(UsageError, match=r"takes a \.litertlm"):
            bench_native(device, tmp_path, OPTIONS, timeout=60)
        with pytest.raises(UsageError, match="both are measured in one go"):
            bench_native(device, model, TurnSizes(n_prompt=0, n_gen=4), timeout=60)


@pytest.mark.parametrize(
    "stdout",
    ["", "not json", "[]", json.dumps({"load_s": 1, "samples": [], "memory": {}})],
    ids=["nothing", "text", "list", "no samples"],
)
def test_a_report_that_is_none(stdout: str) -> None:
    with pytest.raises(DeviceError, match="printed no report"):
        parse_runner(DeviceRun(0, stdout, "", 1.0, PeakMemory()), OPTIONS)


def test_for_android(tmp_path: Path) -> None:
    """It asks for bionic's linker, and every name it takes is the engine's or bionic's."""
    if not (shutil.which("clang") or shutil.which("clang-16")) or not shutil.which("readelf"):
        pytest.skip("no clang, or no readelf")
    folder = build_runner("android", tmp_path)

    def readelf(option: str, name: str) -> str:
        argv = ["readelf", "--wide", option, str(folder / name)]
        return subprocess.run(argv, check=True, capture_output=True, encoding="utf-8").stdout

    symbols = [line.split() for line in readelf("--dyn-syms", "liblitert-lm.so").splitlines()]
    given = {line[7].partition("@")[0] for line in symbols if len(line) > 7 and line[6] != "UND"}
    for name in ("gemma-bench", "gemma-answer"):
        program = readelf("--all", name)
        assert "AArch64" in program and "/system/bin/linker64" in program and "[$ORIGIN]" in program
        assert "Shared library: [liblitert-lm.so]" in program and "Shared library: [libc.so]" in program
        symbols = [line.split() for line in readelf("--dyn-syms", name).splitlines()]
        taken = {line[7] for line in symbols if len(line) > 7 and line[6] == "UND"}
        engine = {name for name in taken if name.startswith("litert_lm_")}
        assert len(engine) > 20 and engine <= given
        assert {name for name in taken - engine if not name.endswith("@LIBC")} == set()
