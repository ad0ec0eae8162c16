"""Speed, bandwidth, peers, comparisons and ceilings, on scripted models and programs."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gemma_edge.benchmarks import ceiling, compare
from gemma_edge.benchmarks.machine import bandwidth, load
from gemma_edge.benchmarks.machine.bandwidth import Bandwidth, stream_read_bandwidth
from gemma_edge.benchmarks.machine.cgroup import mechanism
from gemma_edge.benchmarks.machine.child import ChildError, ChildRun
from gemma_edge.benchmarks.machine.memory import PeakMemory
from gemma_edge.benchmarks.measure import kernel_tests as kernel
from gemma_edge.benchmarks.measure.kernel_tests import (
    bench_decode,
    bench_prefill,
    kernel_argv,
    measurements,
    parse_report,
)
from gemma_edge.benchmarks.options import KernelOptions
from gemma_edge.benchmarks.peers.llama_cpp import (
    ENVIRONMENT_VARIABLE,
    PeerRun,
    find_llama_bench,
    parse_output,
    run_llama_bench,
)
from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.benchmarks.records.record import BundleFacts, read_records
from gemma_edge.benchmarks.script import run_script
from gemma_edge.runtime.errors import DeviceError, GemmaEdgeError, UsageError

MB = 2**20
HIDDEN, PLE_ROW, VOCAB = 8, 12, 50
FACTS = BundleFacts("Gemma 3n: tiny", "int4", 1_000_000_000, 10, 100, "onnx", 256, 64, "fp32")
OPTIONS = KernelOptions(n_prompt=16, n_gen=4, reps=2, threads=1, context=64)


class ScriptedDecoder:
    """Notes what it is fed; refuses what a decoder refuses."""

    context, chunk = 64, 6

    def __init__(self) -> None:
        self.position = 0
        self.runs: list[list[int]] = []  # tokens of each call, by reset
        self.logits = 0

    def reset(self) -> None:
        self.position = 0
        self.runs.append([])

    def forward(self, embeddings: Any, per_layer: Any, n_logits: int = 1) -> Any:
        tokens = len(embeddings)
        assert embeddings.shape == (tokens, HIDDEN) and per_layer.shape == (tokens, PLE_ROW)
        assert 1 <= tokens <= self.chunk and n_logits <= 1
        self.logits += n_logits
        self.position += tokens
        assert self.position <= self.context
        self.runs[-1].append(tokens)
        return np.zeros((n_logits, VOCAB), np.float32)


class ScriptedTable:
    def __init__(self, columns: int) -> None:
        self.columns, self.ids = columns, []  # type: tuple[int, list[int]]

    def lookup(self, ids: Any) -> Any:
        self.ids += ids.tolist()
        return np.zeros((len(ids), self.columns), np.float32)


def scripted_model() -> Any:
    return SimpleNamespace(
        decoder=ScriptedDecoder(), embeddings=ScriptedTable(HIDDEN), per_layer=ScriptedTable(PLE_ROW)
    )


def report(
    prefill_s: float = 1.0, decode_s: float = 1.0, load_s: float = 2.0, anon: int = 10**9
) -> dict[str, Any]:
    tests = [Measurement(16, 0, (int(prefill_s * 1e9),) * 2), Measurement(0, 4, (int(decode_s * 1e9),) * 2)]
    memory = {"steady": {"rss_anon": anon}, "peak": {"rss_anon": anon + 1, "high_water": anon + 2}}
    return {"tests": [t.to_dict() for t in tests], "memory": memory, "load_s": load_s, "import_s": 0.5}


def child(stdout: str = "", stderr: str = "", exit_code: int = 0) -> ChildRun:
    return ChildRun(exit_code, stdout, stderr, 1.0, PeakMemory())


# Kernel -----------------------------------------------------------------------------------------------


def test_prefill_feeds_all_tokens_in_chunks_from_an_empty_cache() -> None:
    model = scripted_model()
    result = bench_prefill(model, 16, reps=3, vocab_size=VOCAB)
    assert model.decoder.runs == [[6, 6, 4]] * 3
    assert model.decoder.logits == 3, "only the end of a prompt has use for logits"
    assert (result.name, result.n_prompt, result.n_gen, len(result.samples_ns)) == ("pp16", 16, 0, 3)


def test_decode_feeds_one_token_at_a_time_from_an_empty_cache() -> None:
    model = scripted_model()
    result = bench_decode(model, 5, reps=2, vocab_size=VOCAB)
    assert model.decoder.runs == [[1] * 5] * 2
    assert result.name == "tg5"


def test_both_tables_are_read_for_the_same_random_ids() -> None:
    model = scripted_model()
    bench_prefill(model, 60, reps=1, vocab_size=VOCAB)
    ids = model.embeddings.ids
    assert ids == model.per_layer.ids
    assert len(set(ids)) > 20 and min(ids) >= 0 and max(ids) < VOCAB


def test_speed_comes_from_the_samples() -> None:
    measurement = Measurement(0, 10, (10**9, 2 * 10**9, 4 * 10**9))
    assert measurement.samples_ts == [10, 5, 2.5]
    assert measurement.avg_ts == pytest.approx(17.5 / 3)
    assert measurement.median_ts == 5
    assert measurement.stddev_ts == pytest.approx(np.std([10, 5, 2.5], ddof=1))
    assert Measurement.from_dict(measurement.to_dict()) == measurement


@pytest.mark.parametrize("samples", [[], [0], [-5], ["x"], None])
def test_measurement_without_times_is_refused(samples: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        Measurement.from_dict({"n_prompt": 1, "n_gen": 0, "samples_ns": samples})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (KernelOptions(n_prompt=0, n_gen=0), "-p and -n"),
        (KernelOptions(n_prompt=-1), "-p and -n"),
        (KernelOptions(reps=0), "-r, -t and --context"),
        (KernelOptions(n_prompt=5000), "5000 tokens do not fit a context of 4096"),
    ],
)
def test_options_that_cannot_be_measured(options: KernelOptions, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        options.check()


def test_kernel_argv_reads_back(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}

    def measure(path: Path, options: KernelOptions, *, import_time: bool) -> dict[str, Any]:
        seen.update(path=path, options=options, import_time=import_time)
        return report()

    monkeypatch.setattr(kernel, "measure", measure)
    argv = kernel_argv(Path("a b"), OPTIONS, import_time=False)
    assert kernel.main(argv[argv.index("gemma_edge.benchmarks.measure.kernel_tests") + 1 :]) == 0
    assert seen == {"path": Path("a b"), "options": OPTIONS, "import_time": False}
    assert parse_report(child(capsys.readouterr().out)) == report()


def test_report_is_the_last_line() -> None:
    assert set(measurements(parse_report(child("noise\n" + json.dumps(report()))))) == {"pp16", "tg4"}


@pytest.mark.parametrize("stdout", ["", "oops", "[]", "{}", '{"tests": [{}]}', '{"tests": 3}'])
def test_run_without_a_report_is_an_error(stdout: str) -> None:
    with pytest.raises(DeviceError, match="no report"):
        parse_report(child(stdout))


def test_failed_run_reports_no_number_and_keeps_its_exit_code() -> None:
    with pytest.raises(ChildError, match="exit code 3: bad bundle") as caught:
        parse_report(child(json.dumps(report()), "warning\nbad bundle\n", exit_code=3))
    assert caught.value.exit_code == 3


def test_kernel_script_of_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(lambda: kernel.main([str(tmp_path / "none"), "--no-import-time"])) == 3
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err and "gemma-edge export" in captured.err


# Bandwidth --------------------------------------------------------------------------------------------


def test_bandwidth_keeps_its_samples() -> None:
    result = stream_read_bandwidth(threads=2, seconds=0.1, bytes_per_thread=64 * MB)
    assert len(result.samples_gb_s) >= bandwidth.MIN_SAMPLES
    assert 0 < result.median <= result.best
    assert result.to_dict()["samples_gb_s"] == [round(s, 3) for s in result.samples_gb_s]


def test_bandwidth_buffers_stay_within_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_available_memory", lambda: 64 * MB)
    assert stream_read_bandwidth(threads=2, seconds=0).buffer_bytes == 8 * MB


def test_busy_cores_leave_out_idle_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(load, "PROC_STAT", stat)
    assert load.busy_cores(0) is None
    stat.write_text("cpu 100 0 0 900 0 0 0 0 0 0\ncpu0 1\ncpu1 1\nintr 5\n")
    later = "cpu 130 0 10 1040 10 0 0 10 99 0\ncpu0 1\ncpu1 1\n"  # 50 of 200 ticks busy, on 2 cores
    monkeypatch.setattr("gemma_edge.benchmarks.machine.load.time.sleep", lambda _: stat.write_text(later))
    assert load.busy_cores() == 0.5


# llama.cpp --------------------------------------------------------------------------------------------

LLAMA_JSON = """[
  {"build_commit": "0c1e570", "build_number": 1, "cpu_info": "AMD EPYC", "model_type": "gemma3n E2B Q4_0",
   "n_prompt": 16, "n_gen": 0, "avg_ns": 500000000, "samples_ns": [500000000, 500000000], "avg_ts": 32.0},
  {"build_commit": "0c1e570", "build_number": 1, "cpu_info": "AMD EPYC", "model_type": "gemma3n E2B Q4_0",
   "n_prompt": 0, "n_gen": 4, "avg_ns": 2000000000, "samples_ns": [2000000000, 2000000000], "avg_ts": 2.0}
]"""


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_llama_bench_is_run_with_our_parameters(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text(LLAMA_JSON)
    binary = script(
        tmp_path / "llama-bench", f'echo "$@" > {tmp_path}/args; sleep 0.2; cat {tmp_path}/out.json'
    )
    run = run_llama_bench(binary, Path("m.gguf"), OPTIONS, timeout=30)
    assert (tmp_path / "args").read_text() == "-m m.gguf -o json -p 16 -n 4 -r 2 -t 1\n"
    assert {name: test.avg_ts for name, test in run.tests.items()} == {"pp16": 32.0, "tg4": 2.0}
    assert (run.build, run.model) == ("0c1e570 (1)", "gemma3n E2B Q4_0")
    assert run.peak_rss > 0


def test_llama_bench_that_fails(tmp_path: Path) -> None:
    binary = script(tmp_path / "llama-bench", "echo 'failed to load model' >&2; exit 1")
    with pytest.raises(ChildError, match="llama-bench ended with exit code 1: failed to load model"):
        run_llama_bench(binary, Path("m.gguf"), OPTIONS, timeout=30)


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", "[{}]", '[{"n_prompt":1,"n_gen":0,"samples_ns":[]}]'])
def test_llama_bench_output_that_is_not_its_json(text: str) -> None:
    with pytest.raises(DeviceError, match="llama-bench printed no JSON"):
        parse_output(text)


def test_llama_bench_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_llama_bench() is None
    binary = script(tmp_path / "llama-bench", "true")
    assert find_llama_bench(binary) == binary
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(binary))
    assert find_llama_bench() == binary
    with pytest.raises(UsageError, match="absent is not a program"):
        find_llama_bench(tmp_path / "absent")


# Compare ----------------------------------------------------------------------------------------------


def compared(prefill_s: float, peer_prefill_s: float, gb_s: float, load_s: float = 2.0) -> compare.Round:
    peer = {
        "pp16": Measurement(16, 0, (int(peer_prefill_s * 1e9),)),
        "tg4": Measurement(0, 4, (2 * 10**9,)),
    }
    return compare.Round(
        Bandwidth(1, 1, (gb_s,)),
        report(prefill_s, load_s=load_s),
        {name: PeerRun(peer, 4 * 10**9, "b", "m") for name in compare.PEERS},
    )


def test_ratios_are_of_one_round_and_their_median_counts() -> None:
    # The whole machine is twice as slow in the second round: the ratio is the same.
    rounds = [compared(1, 2, 8.0, load_s=9), compared(2, 4, 4.0), compared(1, 3, 8.0)]
    metrics = compare.summarize(rounds, FACTS.bytes_per_token)
    assert metrics["prefill_ratio"] == 2
    assert metrics["decode_ratio"] == metrics["litert_lm_decode_ratio"] == 2
    assert metrics["bandwidth_share"] == 0.5  # 1 GB a token x 4 tok/s of 8 GB/s
    assert metrics["load_s"] == 2, "the first load may have been cold"
    assert metrics["rss_anon_bytes"] == 10**9


def test_without_a_peer_there_are_no_ratios() -> None:
    metrics = compare.summarize([compare.Round(Bandwidth(1, 1, (8.0,)), report(), {})], 10**9)
    assert "prefill_ratio" not in metrics and metrics["prefill_ts"] == 16 and metrics["load_s"] == 2


def test_readme_rows_name_bar_and_value() -> None:
    metrics = compare.summarize([compared(1, 2, 8.0)], FACTS.bytes_per_token)
    rows = compare.readme_rows(
        "E2B", metrics, compare.parse_bars(["prefill_ratio=1.7", "rss_anon_bytes=1.7GB"])
    )
    by_label = {row["row"]: (row["bar"], row["value"]) for row in rows}
    assert by_label["E2B: prefill against llama.cpp"] == (">= 1.70x", "2.00x (16.0 against 8.0 tok/s)")
    assert by_label["E2B: decode against LiteRT-LM"] == ("", "2.00x (4.0 against 2.0 tok/s)")
    assert by_label["E2B: RssAnon in steady state"] == ("<= 1.7 GB", "1 GB")
    assert "E2B: load from a warm page cache" not in by_label  # neither a bar nor a comparison


@pytest.mark.parametrize("bar", ["speed=1", "prefill_ratio=fast", "prefill_ratio", "rss_anon_bytes=1G"])
def test_bar_that_cannot_be_read(bar: str) -> None:
    with pytest.raises(UsageError):
        compare.parse_bars([bar])


def test_compare_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order = tmp_path / "order"
    (tmp_path / "out.json").write_text(LLAMA_JSON)
    binary = script(tmp_path / "llama-bench", f"echo peer >> {order}; cat {tmp_path}/out.json")
    ours = script(tmp_path / "ours", f"echo ours >> {order}; echo '{json.dumps(report())}'")
    (tmp_path / "m.gguf").touch()
    monkeypatch.setattr(compare, "bundle_facts", lambda _: FACTS)
    monkeypatch.setattr(compare, "busy_cores", lambda: 1.5)
    monkeypatch.setattr(compare, "kernel_argv", lambda *_: [str(ours)])
    monkeypatch.setattr(compare, "stream_read_bandwidth", lambda *_: Bandwidth(1, 1, (8.0,)))
    argv = [str(tmp_path / "out"), "-p", "16", "-n", "4", "--rounds", "2"]
    argv += ["--llama-bench", str(binary), "--gguf", str(tmp_path / "m.gguf")]
    argv += ["--bar", "prefill_ratio=1.7", "-o", str(tmp_path / "r.jsonl")]
    assert run_script(lambda: compare.main(argv)) == 0
    assert order.read_text().split() == ["ours", "peer", "peer", "ours"]
    captured = capsys.readouterr()
    assert "0.50x (16.0 against 32.0 tok/s)  1.70x missed" in captured.out
    assert "keep 1.5 cores busy" in captured.err
    (written,) = read_records(tmp_path / "r.jsonl")
    assert (written["kind"], written["name"], written["recipe"]) == ("compare", "out", "int4")
    assert written["metrics"]["decode_ratio"] == 2 and written["metrics"]["bytes_per_token"] == 10**9
    assert written["raw"]["rounds"][0]["llama_cpp"]["tests"][0]["samples_ns"] == [500000000] * 2
    assert len(written["raw"]["rounds"]) == 2


def test_gguf_without_llama_bench_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / "m.gguf").touch()
    assert run_script(lambda: compare.main(["out", "--gguf", str(tmp_path / "m.gguf")])) == 2
    assert run_script(lambda: compare.main(["out", "--gguf", str(tmp_path / "none.gguf")])) == 2
    assert run_script(lambda: compare.main(["out", "--llama-bench", "x"])) == 2


# The ceiling ------------------------------------------------------------------------------------------

limited = pytest.mark.skipif(mechanism().name == "none", reason=f"no kernel limit: {mechanism().reason}")
HOLD_150_MB = f"x = b'x' * (150 << 20); print({json.dumps(report())!r})"


def prove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, control: int, code: str = HOLD_150_MB
) -> Any:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(ceiling, "bundle_facts", lambda _: FACTS)
    monkeypatch.setattr(ceiling, "bundle_files", lambda _: [])
    monkeypatch.setattr(ceiling, "kernel_argv", lambda *_, **__: [sys.executable, "-c", code])
    argv = [str(tmp_path / "out"), "-p", "16", "-n", "4", "-o", str(tmp_path / "r.jsonl")]
    return run_script(lambda: ceiling.main([*argv, "--limit", f"{limit}MiB", "--control", f"{control}MiB"]))


@limited
def test_ceiling_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove(tmp_path, monkeypatch, 300, 100) == 0
    assert capsys.readouterr().out == "proved: it runs under 300 MiB, and under 100 MiB it is killed\n"
    (written,) = read_records(tmp_path / "r.jsonl")
    assert written["metrics"]["completed"] and written["metrics"]["control_killed"]
    assert written["raw"]["control"]["kernel"] is None
    (row,) = written["readme"]
    assert row["bar"] == "completes; control at 100 MiB is killed"
    assert row["value"] == "completes, peak RssAnon 1 GB; control killed"


@limited
def test_ceiling_that_is_exceeded_is_exit_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove(tmp_path, monkeypatch, 100, 50) == 5
    assert "does not fit 100 MiB" in capsys.readouterr().err
    (written,) = read_records(tmp_path / "r.jsonl")
    assert written["readme"][0]["value"] == "killed"
    assert "peak_rss_anon_bytes" not in written["metrics"], "a run that was killed has no numbers"


@limited
def test_control_that_completes_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove(tmp_path, monkeypatch, 400, 300) == 5
    assert "lower --control" in capsys.readouterr().err


@limited
def test_run_that_fails_for_another_reason_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prove(tmp_path, monkeypatch, 300, 100, "import sys; sys.exit(3)") == 3
    assert not (tmp_path / "r.jsonl").exists()


def test_control_above_the_limit_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prove(tmp_path, monkeypatch, 100, 200) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GemmaEdgeError("x"), 1),
        (DeviceError("x"), 4),
        (PermissionError(13, "x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_script_ends_with_the_documented_code(error: BaseException, code: int) -> None:
    def main() -> int:
        raise error

    assert run_script(main) == code
