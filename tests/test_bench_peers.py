"""Peers: which are found, how they are interleaved, and real ones on a tiny checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.measure import session
from gemma_edge.benchmarks.peers import interleaved as peers
from gemma_edge.benchmarks.peers.interleaved import (
    Peer,
    find_peers,
    interleave,
    merged,
    ratios,
    run_library,
    run_litert_lm,
)
from gemma_edge.benchmarks.peers.llama_cpp import (
    ENVIRONMENT_VARIABLE,
    find_llama_bench,
    parse_output,
    run_llama_bench,
)
from gemma_edge.benchmarks.records.measurement import KernelTest, PeerRun, TurnSizes
from gemma_edge.benchmarks.records.run_report import Round, RunReport
from gemma_edge.cli.main import main
from gemma_edge.devices.machine.child import ChildError
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.errors import DeviceError, UsageError
from support.results import read_rows

SIZES = TurnSizes(n_prompt=16, n_gen=8, reps=2, threads=1, context=256)


def speeds(prefill: float, decode: float) -> tuple[KernelTest, KernelTest]:
    """pp16 and tg8 at these tokens per second."""
    return KernelTest(16, 0, (int(16e9 / prefill),)), KernelTest(0, 8, (int(8e9 / decode),))


def peer(name: str, order: list[str], prefill: float, decode: float) -> Peer:
    def run(sizes: TurnSizes) -> PeerRun:
        assert sizes == SIZES
        order.append(name)
        return PeerRun(speeds(prefill, decode), 10**9, "build", "model")

    return Peer(name, Path("model"), run)


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking whether the machine is busy takes a second."""
    for module in (peers, session):
        monkeypatch.setattr(module, "busy_cores", lambda: None)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)


@pytest.mark.usefixtures("nothing_installed")
def test_peers_that_are_absent_are_left_out_with_their_reasons() -> None:
    found, skipped = find_peers({}, None)
    assert found == []
    assert [reason.partition(":")[0] for reason in skipped] == ["llama.cpp", *peers.LIBRARIES]
    assert "no llama-bench" in skipped[0] and "litert_lm is not installed" in skipped[1]


def test_peers_without_a_model_are_left_out_with_their_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: object())
    found, skipped = find_peers({}, str(program))
    assert found == [] and "--gguf" in skipped[0] and "--checkpoint" in skipped[3]
    (tmp_path / "m.gguf").touch()
    found, _ = find_peers({"llama.cpp": tmp_path / "m.gguf", "transformers": tmp_path}, str(program))
    assert [each.name for each in found] == ["llama.cpp", "transformers"]


def test_model_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"litert-lm.*no such file"):
        find_peers({"litert-lm": tmp_path / "none.litertlm"}, None)


def test_rounds_are_interleaved_and_every_other_one_is_reversed() -> None:
    order: list[str] = []

    def ours() -> RunReport:
        order.append("ours")
        return RunReport(tests=speeds(100, 10))

    rounds, failed = interleave(ours, [peer("a", order, 50, 5), peer("b", order, 200, 20)], SIZES, 2)
    assert order == ["ours", "a", "b", "b", "a", "ours"] and failed == []
    found = {(r.engine, r.test): (r.ratio, r.rounds) for r in ratios(rounds)}
    assert found[("a", "pp16")] == (2.0, 2) and found[("b", "tg8")] == (0.5, 2)
    assert {name: len(tests) for name, tests in merged(rounds).items()} == {"a": 2, "b": 2}
    assert len(merged(rounds)["a"][0].samples_ns) == 2


def test_ratio_is_of_one_round_and_their_median_counts() -> None:
    # The machine is twice as slow in the second round, and noisy in the third.
    pairs = [(100, 50), (50, 25), (90, 30)]
    rounds = [
        Round(RunReport(tests=speeds(us, 1)), {"a": PeerRun(speeds(them, 1), 1, "", "")})
        for us, them in pairs
    ]
    (prefill, decode) = ratios(rounds)
    assert prefill.ratio == pytest.approx(2.0, rel=1e-3) and decode.ratio == 1.0


def test_peer_that_fails_is_left_out_and_the_others_go_on() -> None:
    order: list[str] = []

    def broken(sizes: TurnSizes) -> PeerRun:
        order.append("broken")
        raise DeviceError("it hangs")

    all_peers = [Peer("broken", Path("m"), broken), peer("a", order, 50, 5)]
    rounds, failed = interleave(lambda: RunReport(tests=speeds(1, 1)), all_peers, SIZES, 2)
    assert order == ["broken", "a", "a"], "it is not tried again"
    assert failed == ["broken: it hangs"]
    assert {ratio.engine for ratio in ratios(rounds)} == {"a"}


def test_library_that_refuses_its_model_is_an_error_of_one_line(tmp_path: Path) -> None:
    # Where it is not installed, the import is what fails.
    with pytest.raises(ChildError, match=r"genai ended with exit code 4: .*Error: ") as caught:
        run_library("onnxruntime-genai", tmp_path, SIZES, timeout=600)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("stdout", ["", "[]", '{"tests": []', '{"tests": [{}], "build": "", "model": ""}'])
def test_library_without_a_result(stdout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat <<'EOF'\n{stdout}\nEOF\n")
    program.chmod(0o755)
    monkeypatch.setattr(peers.sys, "executable", str(program))
    with pytest.raises(DeviceError, match="printed no report"):
        run_library("transformers", tmp_path, SIZES, timeout=300)


def test_real_transformers(tiny_checkpoint: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    run = run_library("transformers", tiny_checkpoint, SIZES, timeout=600)
    check(run, "transformers")


@pytest.fixture(scope="module")
def litertlm(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .litertlm with a context of 256."""
    pytest.importorskip("litert_lm")
    path = tmp_path_factory.mktemp("litertlm") / "tiny.litertlm"
    options: dict[str, Any] = {"context": 256, "chunk": 64, "verify": False, "calibrate": "none"}
    return export_bundle(tiny_checkpoint, path, format="litertlm", **options).path


def test_real_litert_lm(litertlm: Path, tmp_path: Path) -> None:
    """One prefill of a prompt of that length: a second one, of a template, would not fit the context."""
    run = run_litert_lm(litertlm, replace(SIZES, n_prompt=200), tmp_path, timeout=600)
    check(run, "litert-lm-api", "pp200")
    assert any(tmp_path.iterdir()), "the weights were not packed"


def test_litert_lm_that_fails(litertlm: Path, tmp_path: Path) -> None:
    """The error is ours, not what the engine logs at its end."""
    with pytest.raises(ChildError, match="error: LiteRT-LM generates nothing with 300"):
        run_litert_lm(litertlm, replace(SIZES, n_prompt=300, context=512), tmp_path, timeout=600)


def test_bench_beside_real_litert_lm(litertlm: Path, tmp_path: Path, capsys: Any) -> None:
    """The whole verb on a .litertlm, with Google's runtime on the same file."""
    bundle = litertlm
    path, record = tmp_path / "r.jsonl", tmp_path / "records.jsonl"
    argv = [
        "bench",
        str(bundle),
        "--against",
        str(bundle),
        "-p",
        "16",
        "-n",
        "8",
        "-r",
        "2",
        "-t",
        "1",
        "--requests",
        "0",
        "--no-cold",
    ]
    argv += ["--bandwidth", "0s", "--peers", "--rounds", "2", "-o", f"md,{path}", "--record", str(record)]
    assert main(argv) == 0
    captured = capsys.readouterr()
    rows = read_rows(path)
    theirs = [row for row in rows if row["kind"] == "bench" and row["engine"] == "litert-lm"]
    assert [row["test"] for row in theirs] == ["pp16", "tg8"]
    assert all(len(row["samples_ns"]) == 4 and row["avg_ts"] > 0 and row["peak_rss"] > 0 for row in theirs)
    row = rows[-1]
    assert {(r["engine"], r["test"], r["rounds"]) for r in row["ratios"]} == {
        (name, test, 2) for name in ("litert-lm", "the other bundle") for test in ("pp16", "tg8")
    }
    (compared,) = read_rows(record)
    labels = {line["row"].partition(": ")[2] for line in compared["readme"]}
    assert labels >= {"prefill against LiteRT-LM", "decode against the other bundle"}
    assert compared["metrics"]["litert_lm_decode_ts"] > 0 and len(compared["raw"]["rounds"]) == 2
    assert len(row["rounds"]) == 2
    json.dumps(row["rounds"][0]["peers"]["litert-lm"])
    assert "| against litert-lm |" in captured.out
    assert (
        "left out: transformers: no model" in captured.err or "transformers is not installed" in captured.err
    )


def check(run: PeerRun, build: str, prefill: str = "pp16") -> None:
    assert {test.test for test in run.tests} == {prefill, "tg8"}
    assert all(len(test.samples_ns) == 2 and test.avg_ts > 0 for test in run.tests)
    assert run.build.startswith(build) and run.peak_rss > 2**26


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
    run = run_llama_bench(binary, Path("m.gguf"), SIZES, timeout=300)
    assert (tmp_path / "args").read_text() == "-m m.gguf -o json -p 16 -n 8 -r 2 -t 1\n"
    assert {test.test: test.avg_ts for test in run.tests} == {"pp16": 32.0, "tg4": 2.0}
    assert (run.build, run.model) == ("0c1e570 (1)", "gemma3n E2B Q4_0")
    assert run.peak_rss > 0


def test_llama_bench_that_fails(tmp_path: Path) -> None:
    binary = script(tmp_path / "llama-bench", "echo 'failed to load model' >&2; exit 1")
    with pytest.raises(ChildError, match="llama-bench ended with exit code 1: failed to load model"):
        run_llama_bench(binary, Path("m.gguf"), SIZES, timeout=300)


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
