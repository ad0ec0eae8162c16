"""`gemma-edge bench`: real workers on tiny bundles, what becomes of their figures, and what happens when they
fail.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.measure import session, target
from gemma_edge.benchmarks.measure.bars import Bars
from gemma_edge.benchmarks.measure.latency import percentile, prompt_text
from gemma_edge.benchmarks.measure.sustained import summarize_sustained
from gemma_edge.benchmarks.measure.target import LocalTarget
from gemma_edge.benchmarks.measure.workload import Sizes, Workload
from gemma_edge.benchmarks.output.result_text import CSV_FIELDS, parse_outputs, plus_minus
from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.benchmarks.records.run_report import (
    Latency,
    Percentiles,
    RunReport,
    SustainedPoint,
)
from gemma_edge.cli.bench import duration
from gemma_edge.cli.main import main
from gemma_edge.devices.machine import cgroup
from gemma_edge.devices.machine.cgroup import Mechanism, mechanism
from gemma_edge.devices.machine.child import ChildRun
from gemma_edge.devices.machine.clock import ClockReading
from gemma_edge.devices.machine.memory import MOST_POINTS, MemoryTimeline, PeakMemory
from gemma_edge.devices.machine.sensors import Battery, Sensors, read_sensors
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.model import Model
from support.results import read_rows

limited = pytest.mark.skipif(mechanism().name == "none", reason=f"no kernel limit: {mechanism().reason}")
MB = 2**20
QUICK = ["-r", "2", "-t", "1", "--bandwidth", "0s", "--no-cold"]
SMALL = [*QUICK, "-p", "16", "-n", "4", "--requests", "0"]


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking whether the machine is busy takes a second."""
    monkeypatch.setattr(session, "busy_cores", lambda: None)


def plain_bundle(checkpoint: Path, out: Path, format: str) -> Path:
    options: dict[str, Any] = {"context": 256, "chunk": 64, "verify": False, "calibrate": "none"}
    return export_bundle(checkpoint, out, format=format, **options).path


@pytest.fixture(scope="module")
def litertlm(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("litertlm") / "tiny.litertlm"
    return plain_bundle(tiny_checkpoint, out, "litertlm")


@pytest.fixture(scope="module")
def tflite(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tflite") / "tiny"
    return plain_bundle(tiny_checkpoint, out, "tflite")


@pytest.fixture(scope="module")
def rows(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of one complete run."""
    path = tmp_path_factory.mktemp("bench") / "results.jsonl"
    argv = ["bench", str(tiny_bundle), "-p", "16,32", "-n", "4", "-d", "0,20", "-r", "3", "-t", "1"]
    argv += [
        "--requests",
        "3",
        "--prompt",
        "40",
        "--tokens",
        "5",
        "--sustained",
        "0.3s",
        "--bandwidth",
        "0.05s",
    ]
    assert main([*argv, "-o", str(path), "--name", "tiny"]) == 0
    return read_rows(path)


# As tools/llama-bench of llama.cpp prints them, `test::get_fields` and the samples behind them.
LLAMA_BENCH = """
build_commit build_number cpu_info gpu_info backends model_filename model_type model_size model_n_params
n_batch n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v n_gpu_layers n_cpu_moe split_mode
main_gpu no_kv_offload flash_attn devices tensor_split tensor_buft_overrides load_mode lazy_mode embeddings
no_op_offload no_host repack fit_target fit_min_ctx n_prompt n_gen n_depth test_time avg_ns stddev_ns
avg_ts stddev_ts samples_ns samples_ts
""".split()


# What is measured -------------------------------------------------------------------------------------


def test_every_combination_is_a_row_with_the_fields_of_llama_bench(rows: list[dict[str, Any]]) -> None:
    tests = [row for row in rows if row["kind"] == "bench"]
    names = ["pp16", "pp32", "tg4", "pp16 @ d20", "pp32 @ d20", "tg4 @ d20"]
    assert [row["test"] for row in tests] == names
    for row in tests:
        assert set(LLAMA_BENCH) <= set(row)
        assert [key for key in LLAMA_BENCH if row[key] is None] == []
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 3
        tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"][0] == pytest.approx(tokens / row["samples_ns"][0] * 1e9, rel=1e-3)
        assert min(row["samples_ts"]) <= row["median_ts"] <= max(row["samples_ts"])
        assert row["avg_ns"] == pytest.approx(sum(row["samples_ns"]) / 3, abs=1)
        assert row["cpu_s"] > 0 and row["major_faults"] >= 0
    decode = next(row for row in tests if row["test"] == "tg4")
    share = decode["bytes_per_token"] * decode["median_ts"] / (decode["bandwidth_gb_s"] * 1e9)
    assert decode["bandwidth_share"] == pytest.approx(share, rel=0.01, abs=1e-4)
    assert tests[0]["bandwidth_share"] is None, "a prefill reads weights once for many tokens"


def test_session_holds_all_that_is_not_speed(rows: list[dict[str, Any]]) -> None:
    (session,) = [row for row in rows if row["kind"] == "session"]
    assert session["run"] == rows[0]["run"] and session["name"] == "tiny" and session["problems"] == []
    assert session["load"]["cold_s"] > 0 and session["load"]["warm_s"] > 0 and session["load"]["import_s"] > 0
    assert session["latency"]["prompt_tokens"] in range(36, 41)
    assert len(session["latency"]["samples_ttft_ms"]) == 3
    assert len(session["latency"]["samples_itl_ms"]) == 3 * 4
    assert min(session["latency"]["samples_itl_ms"]) > 0
    memory = session["memory"]
    assert memory["peak"]["high_water"] >= memory["steady"]["rss"] > memory["steady"]["rss_anon"] > 10 * MB
    assert memory["peak"]["pss"] > 0 and memory["steady"]["major_faults"] >= 0
    timeline = memory["timeline"]
    assert len(timeline["seconds"]) == len(timeline["rss_anon"]) == len(timeline["rss_file"]) > 5
    assert timeline["seconds"] == sorted(timeline["seconds"])
    assert [phase["name"] for phase in session["phases"]][:3] == ["load", "pp16, warm-up", "pp16"]
    assert len(session["sustained"]["points"]) >= 1 and session["sustained"]["points"][0]["tg_ts"] > 0


@pytest.mark.parametrize("form", ["tflite", "litertlm"])
def test_other_formats_are_measured_alike(
    form: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", str(request.getfixturevalue(form)), *QUICK, "-p", "16", "-n", "4", "-o", "jsonl"]
    if form == "tflite":
        argv.remove("--no-cold")
    assert main([*argv, "--requests", "1", "--prompt", "40", "--tokens", "3"]) == 0
    tests = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("test") for row in tests] == ["pp16", "tg4", None]
    assert tests[0]["format"] == form and tests[0]["engine"].startswith("LiteRT ")
    assert tests[2]["latency"]["requests"] == 1
    measured = {"first_s", "cold_s", "warm_s"} if form == "tflite" else {"warm_s"}
    assert all(tests[2]["load"][key] > 0 for key in measured)


def test_outputs_go_to_stdout_and_files(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", str(tiny_bundle), *SMALL, "-o", "md,jsonl,table.csv"]) == 0
    out = capsys.readouterr().out
    assert "| model | engine | threads | test |" in out and "| pp16 |" in out and "| memory, peak |" in out
    (results,) = tmp_path.glob("bench-*.jsonl")
    assert len(read_rows(results)) == 3
    table = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert tuple(table[0]) == CSV_FIELDS
    assert [(row["test"], row["n_threads"]) for row in table] == [("pp16", "1"), ("tg4", "1")]
    assert float(table[0]["avg_ts"]) > 0


# Ceilings and bars ------------------------------------------------------------------------------------


@limited
def test_ceiling_that_holds_is_proved_by_a_control(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    argv = ["bench", str(tiny_bundle), *SMALL, "--ceiling", "600MiB", "--control", "12MiB", "-o", str(path)]
    assert main(argv) == 0
    session = read_rows(path)[-1]
    ceiling = session["ceiling"]
    assert ceiling["met"] and ceiling["enforced"] and ceiling["control_killed"]
    assert ceiling["mechanism"] == mechanism().name
    assert "control under 12 MiB was killed" in ceiling["text"]
    assert session["load"]["warm_s"] is None, "a load under a limit is not a warm one"


@limited
def test_ceiling_that_is_exceeded_is_exit_5_and_has_no_numbers(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    assert main(["bench", str(tiny_bundle), *SMALL, "--ceiling", "16MiB", "-o", f"md,{path}"]) == 5
    (session,) = read_rows(path)
    assert not session["ceiling"]["met"] and "killed by the kernel under 16 MiB" in session["ceiling"]["text"]
    assert session["memory"] is None and session["latency"] is None
    captured = capsys.readouterr()
    assert "tok/s" not in captured.out and "the ceiling of 16 MiB" in captured.err


@pytest.mark.parametrize(("size", "code", "verdict"), [("4GiB", 0, "not exceeded"), ("20MiB", 5, "exceeded")])
def test_ceiling_is_sampled_where_the_kernel_does_not_let_us(
    size: str, code: int, verdict: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "mechanism", lambda: Mechanism("none", "no permission"))
    path = tmp_path / "r.jsonl"
    assert main(["bench", str(tiny_bundle), *SMALL, "--ceiling", size, "-o", str(path)]) == code
    ceiling = read_rows(path)[-1]["ceiling"]
    assert ceiling["text"].startswith(f"{verdict}, sampled, not enforced") and not ceiling["enforced"]
    assert "no permission" in ceiling["text"]


@limited
def test_control_that_is_not_killed_proves_nothing(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    assert main(["bench", str(tiny_bundle), *SMALL, "--ceiling", "2GiB", "-o", str(path)]) == 5
    ceiling = read_rows(path)[-1]["ceiling"]
    assert ceiling["control_killed"] is False and not ceiling["met"]
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the ceiling of 2 GiB: not proved: runs under 2 GiB" in said
    assert "the control under 1 GiB was not killed" in said and "exceeded" not in said
    assert "give --control below " in said and "or a lower --ceiling" in said


def test_systemd_run_is_asked_for_a_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that makes no group: what it is told, and that an uncounted scope is refused."""
    stand_in = tmp_path / "systemd-run"
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/args\nwhile [ "$1" != /bin/sh ]; do shift; done\nexec "$@"\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(cgroup, "_COUNT", '"$@"; echo "oom_kill 1" > "$0/memory.events"; kill -9 $$')
    run = cgroup._run_in_scope(("OOMPolicy=continue",), ["true"], 64 * MB, timeout=60, env=None)
    assert run.killed and run.mechanism == "systemd-run" and run.peak_bytes is None
    told = (tmp_path / "args").read_text()
    assert f"-p MemoryMax={64 * MB} -p MemorySwapMax=0 -p OOMPolicy=continue /bin/sh -c" in told
    monkeypatch.setattr(cgroup, "_COUNT", '"$@"')
    with pytest.raises(DeviceError, match="counts no memory"):
        cgroup._run_in_scope((), ["true"], 64 * MB, timeout=60, env=None)


def test_bar_that_is_missed_is_exit_5_and_keeps_the_results(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    argv = ["bench", str(tiny_bundle), *SMALL, "--assert-decode-tps", "1e9", "--assert-prefill-tps", "0.001"]
    assert main([*argv, "-o", f"md,{path}"]) == 5
    *tests, session = read_rows(path)
    assert [row["test"] for row in tests] == ["pp16", "tg4"]
    assert [bar["met"] for bar in session["bars"]] == [True, False]
    captured = capsys.readouterr()
    assert "MISSED" in captured.out and "decode, tok/s" in captured.err


def test_bars_judge_the_slowest_test_and_the_median_wait() -> None:
    tests = [Measurement(0, 9, (ns,)) for ns in (10**9, 818_181_818)]
    latency = Latency(40, 5, 2, Percentiles(100.0, 900.0, 900.0))
    judged = Bars(ttft_ms=100, decode_tps=10).judge(latency, tests)
    assert [(bar.value, bar.met) for bar in judged] == [(100.0, True), (9.0, False)]


# Failures ---------------------------------------------------------------------------------------------


def test_run_that_hangs_is_exit_4_and_keeps_what_was_known(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    monkeypatch.setattr(target, "worker_argv", lambda *_: ["sleep", "infinity"])
    argv = ["bench", str(tiny_bundle), *SMALL, "--timeout", "0.3s", "-o", str(path)]
    assert main(argv) == 4
    (session,) = read_rows(path)
    assert "did not finish within" in session["error"] and session["memory"] is None


def test_damaged_bundle_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "none")]) == 3
    assert "gemma-edge export" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stdout",
    [
        *("", "oops", "[]", '{"schema": 99}', '{"schema": "1"}', '{"tests": [{}]}', '{"tests": {}}'),
        '{"tests": [{"n_prompt": 1, "n_gen": 0, "samples_ns": [0]}]}',
        '{"load_s": NaN}',
    ],
)
def test_worker_without_a_report_is_an_error(stdout: str) -> None:
    with pytest.raises(DeviceError, match="no report"):
        ChildRun(0, stdout, "", 1.0, PeakMemory()).parse(RunReport, "the measured run")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["-p", "300"], "300 tokens do not fit a context of 256"),
        (["-p", "0", "-n", "8", "-d", "250"], "258 tokens do not fit"),
        (["-n", "8", "-p", "8", "-r", "0"], "-r, -t and --prompt"),
        (["-p", "8", "-n", "0", "--sustained", "1s"], "--sustained needs -n"),
        (["-p", "8", "-n", "8", "--control", "1GiB"], "--control needs a --ceiling"),
        (["-p", "8", "-n", "8", "--requests", "0", "--assert-ttft-ms", "1"], "--assert-ttft-ms needs"),
        (["-p", "8", "-n", "0", "--assert-decode-tps", "1"], "needs such a test"),
        (["-p", "8", "-n", "8", "--ceiling", "2G"], "powers of 1024"),
        (["-p", "8", "-n", "8", "--sustained", "30"], "no duration"),
        (["-p", "8", "-n", "8", "-o", "xml"], "-o xml"),
        (["-p", "8", "-n", "8", "--gguf", "x.gguf"], "--gguf is for --peers"),
        (["-p", "8", "-n", "8", "--llama-bench", "x"], "--llama-bench is for --peers"),
        (["-p", "8", "-n", "8", "--image", "1"], "--image and --audio are for --answer"),
        (["-p", "8", "-n", "8", "--answer"], "--answer with 0 images and 0 recordings"),
        (["-p", "8", "-n", "8", "--target", "speed=1"], "--target speed=1: expected FIGURE=TEXT"),
        (["-p", "8", "-n", "8", "--peers", "--device", "adb"], "this machine only"),
        (["-p", "8", "-n", "8", "--prompt", "2"], "no room for text"),
        (["-p", "8", "-n", "8", "--device", "serial:/dev/tty"], "--device serial"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(
    argv: list[str], problem: str, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "bench",
        str(tiny_bundle),
        "--bandwidth",
        "0.01s",
        "--no-cold",
        "--prompt",
        "40",
        "--tokens",
        "4",
        *argv,
    ]
    assert main(argv) == 2
    assert problem in capsys.readouterr().err


# Parts ------------------------------------------------------------------------------------------------


def test_workload_crosses_a_process() -> None:
    workload = Workload(prompts=(1, 2), gens=(0, 3), depths=(0, 9), context=64, cold=True, sustained_s=1.5)
    assert Workload.from_json(workload.to_json()) == workload
    assert list(workload.tests()) == [
        Sizes(1, 0, 0), Sizes(2, 0, 0), Sizes(0, 3, 0), Sizes(1, 0, 9), Sizes(2, 0, 9), Sizes(0, 3, 9)
    ]  # fmt: skip
    for text in ("", "[]", '{"prompts": 1}', '{"prompts": [1.5]}', '{"reps": true}'):
        with pytest.raises(UsageError, match="not a workload"):
            Workload.from_json(text)


def test_bandwidth_of_a_process_of_its_own(tiny_bundle: Path) -> None:
    bandwidth = LocalTarget(tiny_bundle).bandwidth(1, 0.05)
    assert bandwidth.threads == 1 and 0.01 < bandwidth.median_gb_s < 20000


def test_prompt_has_the_tokens_that_are_asked_for(tiny_bundle: Path) -> None:
    model = Model.load(tiny_bundle)
    for wanted in (30, 100, 200):
        assert wanted - 3 <= len(model.prompt_ids(prompt_text(model, wanted))) <= wanted


@pytest.mark.parametrize(("percent", "value"), [(50, 5), (90, 9), (99, 10), (100, 10), (1, 1)])
def test_percentile_is_one_of_the_samples(percent: float, value: float) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == value
    assert percentile([3.5], percent) == 3.5


def test_timeline_is_thinned_and_stays_in_order() -> None:
    timeline = MemoryTimeline(origin=0.0)
    for i in range(10 * MOST_POINTS):
        timeline.add(i, 0)
    points = timeline.points
    assert MOST_POINTS / 2 <= len(points.rss_anon) <= MOST_POINTS
    steps = {b - a for a, b in zip(points.rss_anon, points.rss_anon[1:], strict=False)}
    assert len(steps) == 1, "evenly"
    assert len(points.seconds) == len(points.rss_file) == len(points.rss_anon)


def test_clock_that_jumps_and_machine_that_sleeps_are_noted() -> None:
    start = ClockReading(wall=1000.0, monotonic=50.0, boot=60.0)
    assert start.notes(ClockReading(1100.01, 150.0, 160.0)) == []
    (jumped,) = start.notes(ClockReading(4700.0, 150.0, 160.0))
    assert "jumped by +3600.0 s" in jumped
    (slept,) = start.notes(ClockReading(1130.0, 150.0, 190.0))
    assert "slept for 30.0 s" in slept
    assert start.notes(ClockReading(900.0, 150.0, None)) == [
        "the wall clock jumped by -200.0 s during the run; times are of the monotonic clock"
    ]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_sensors_of_a_board(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "class/thermal/thermal_zone0/temp": "61300",
            "class/thermal/thermal_zone0/type": "cpu-thermal",
            "class/thermal/thermal_zone1/temp": "-274000",
            "devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1500000",
            "devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "2400000",
            "devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand",
            "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3",
            "devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "4",
            "devices/platform/soc/soc:firmware/get_throttled": "50005",
            "class/power_supply/AC/type": "Mains",
            "class/power_supply/battery/type": "Battery",
            "class/power_supply/battery/capacity": "81",
            "class/power_supply/battery/status": "Discharging",
            "class/power_supply/battery/temp": "314",
        },
    )
    assert read_sensors(root) == Sensors(
        temperature_c=61.3,
        zones_c={"cpu-thermal": 61.3},
        frequency_mhz=[1500],
        max_frequency_mhz=[2400],
        governors=["ondemand"],
        throttle_count=7,
        throttled=["under-voltage", "throttled"],
        battery=Battery(percent=81, status="Discharging", temperature_c=31.4),
    )


def test_sensors_that_are_missing_are_none(tmp_path: Path) -> None:
    assert read_sensors(tmp_path) == Sensors()
    write(tmp_path, {"class/thermal/thermal_zone0/temp": "warm"})
    assert read_sensors(tmp_path) == Sensors()


def test_sustained_compares_its_first_tenth_with_its_last() -> None:
    points = [SustainedPoint(i, 10.0 if i < 10 else 8.0, temperature_c=40.0 + i) for i in range(20)]
    summary = summarize_sustained(points)
    assert summary is not None and summary.decode_kept == 0.8
    assert "10.00 at the beginning, 8.00 tok/s at the end (80%), 40 to 58 °C" in summary.text
    assert summarize_sustained(None) is None and summarize_sustained([]) is None


def test_small_speeds_keep_their_digits() -> None:
    pairs = [(12.346, 0.051), (0.0057, 0.00012), (0.0057, 0.0), (0.5, 0.2)]
    shown = ["12.35 ± 0.05", "0.00570 ± 0.00012", "0.0057 ± 0.0000", "0.50 ± 0.20"]
    assert [plus_minus(*pair) for pair in pairs] == shown


def test_outputs_are_parsed() -> None:
    assert parse_outputs("md", "r") == [("md", None)]
    assert parse_outputs("csv,jsonl,a/b.md", "r") == [
        ("csv", None), ("jsonl", Path("bench-r.jsonl")), ("md", Path("a/b.md"))
    ]  # fmt: skip
    for text in ("", ",", "x.html"):
        with pytest.raises(UsageError, match="-o"):
            parse_outputs(text, "r")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds
    for bad in ("", "5", "s", "-1s", "1d"):
        with pytest.raises(UsageError):
            duration(bad)
