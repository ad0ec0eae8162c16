"""Peers: which are found, how they are interleaved, and real ones on a tiny checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.machine.child import ChildError
from gemma_edge.benchmarks.options import KernelOptions
from gemma_edge.benchmarks.peers import interleaved as peers
from gemma_edge.benchmarks.peers.interleaved import (
    Peer,
    PeerRound,
    find_peers,
    interleave,
    merged,
    ratios,
    run_library,
    run_litert_lm,
)
from gemma_edge.benchmarks.peers.llama_cpp import ENVIRONMENT_VARIABLE, PeerRun
from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.benchmarks.records.record import read_records
from gemma_edge.cli.main import main
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.errors import DeviceError, UsageError

SIZES = KernelOptions(n_prompt=16, n_gen=8, reps=2, threads=1, context=256)


def speeds(prefill: float, decode: float) -> dict[str, Measurement]:
    """pp16 and tg8 at these tokens per second."""
    tests = [Measurement(16, 0, (int(16e9 / prefill),)), Measurement(0, 8, (int(8e9 / decode),))]
    return {test.name: test for test in tests}


def peer(name: str, order: list[str], prefill: float, decode: float) -> Peer:
    def run(options: KernelOptions) -> PeerRun:
        assert options == SIZES
        order.append(name)
        return PeerRun(speeds(prefill, decode), 10**9, "build", "model")

    return Peer(name, Path("model"), run)


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

    def ours() -> dict[str, Measurement]:
        order.append("ours")
        return speeds(100, 10)

    rounds, failed = interleave(ours, [peer("a", order, 50, 5), peer("b", order, 200, 20)], SIZES, 2)
    assert order == ["ours", "a", "b", "b", "a", "ours"] and failed == []
    found = {(r["engine"], r["test"]): (r["ratio"], r["rounds"]) for r in ratios(rounds)}
    assert found[("a", "pp16")] == (2.0, 2) and found[("b", "tg8")] == (0.5, 2)
    assert {name: len(tests) for name, tests in merged(rounds).items()} == {"a": 2, "b": 2}
    assert len(merged(rounds)["a"][0].samples_ns) == 2


def test_ratio_is_of_one_round_and_their_median_counts() -> None:
    # The machine is twice as slow in the second round, and noisy in the third.
    pairs = [(100, 50), (50, 25), (90, 30)]
    rounds = [PeerRound(speeds(us, 1), {"a": PeerRun(speeds(them, 1), 1, "", "")}) for us, them in pairs]
    (prefill, decode) = ratios(rounds)
    assert prefill["ratio"] == pytest.approx(2.0, rel=1e-3) and decode["ratio"] == 1.0


def test_peer_that_fails_is_left_out_and_the_others_go_on() -> None:
    order: list[str] = []

    def broken(options: KernelOptions) -> PeerRun:
        order.append("broken")
        raise DeviceError("it hangs")

    all_peers = [Peer("broken", Path("m"), broken), peer("a", order, 50, 5)]
    rounds, failed = interleave(lambda: speeds(1, 1), all_peers, SIZES, 2)
    assert order == ["broken", "a", "a"], "it is not tried again"
    assert failed == ["broken: it hangs"]
    assert {ratio["engine"] for ratio in ratios(rounds)} == {"a"}


def test_library_that_refuses_its_model_is_an_error_of_one_line(tmp_path: Path) -> None:
    # Where it is not installed, the import is what fails.
    with pytest.raises(ChildError, match=r"genai ended with exit code 4: .*Error: ") as caught:
        run_library("onnxruntime-genai", tmp_path, SIZES, timeout=120)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("stdout", ["", "[]", '{"tests": []', '{"tests": [{}], "build": "", "model": ""}'])
def test_library_without_a_result(stdout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat <<'EOF'\n{stdout}\nEOF\n")
    program.chmod(0o755)
    monkeypatch.setattr(peers.sys, "executable", str(program))
    with pytest.raises(DeviceError, match="printed no result"):
        run_library("transformers", tmp_path, SIZES, timeout=30)


def test_real_transformers(tiny_checkpoint: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    run = run_library("transformers", tiny_checkpoint, SIZES, timeout=300)
    check(run, "transformers")


@pytest.fixture(scope="module")
def litertlm(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .litertlm with a context of 256."""
    pytest.importorskip("litert_lm")
    path = tmp_path_factory.mktemp("litertlm") / "tiny.litertlm"
    return export_bundle(tiny_checkpoint, path, context=256, chunk=64, format="litertlm", verify=False).path


def test_real_litert_lm(litertlm: Path, tmp_path: Path) -> None:
    """One prefill of a prompt of that length: a second one, of a template, would not fit the context."""
    run = run_litert_lm(litertlm, replace(SIZES, n_prompt=200), tmp_path, timeout=300)
    check(run, "litert-lm-api", "pp200")
    assert any(tmp_path.iterdir()), "the weights were not packed"


def test_litert_lm_that_fails(litertlm: Path, tmp_path: Path) -> None:
    """The error is ours, not what the engine logs at its end."""
    with pytest.raises(ChildError, match="error: LiteRT-LM generates nothing with 300"):
        run_litert_lm(litertlm, replace(SIZES, n_prompt=300, context=512), tmp_path, timeout=300)


def test_bench_beside_real_litert_lm(litertlm: Path, tmp_path: Path, capsys: Any) -> None:
    """The whole verb on a .litertlm, with Google's runtime on the same file."""
    bundle = litertlm
    path = tmp_path / "r.jsonl"
    argv = ["bench", str(bundle), "-p", "16", "-n", "8", "-r", "2", "-t", "1", "--requests", "0", "--no-cold"]
    argv += ["--bandwidth", "0s", "--peers", "--rounds", "2", "-o", f"md,{path}"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    rows = read_records(path)
    theirs = [row for row in rows if row["kind"] == "bench" and row["engine"] == "litert-lm"]
    assert [row["test"] for row in theirs] == ["pp16", "tg8"]
    assert all(len(row["samples_ns"]) == 4 and row["avg_ts"] > 0 and row["peak_rss"] > 0 for row in theirs)
    session = rows[-1]
    assert {(r["engine"], r["test"], r["rounds"]) for r in session["ratios"]} == {
        ("litert-lm", "pp16", 2), ("litert-lm", "tg8", 2)
    }  # fmt: skip
    assert len(session["rounds"]) == 2
    json.dumps(session["rounds"][0]["peers"]["litert-lm"])
    assert "| against litert-lm |" in captured.out
    assert (
        "left out: transformers: no model" in captured.err or "transformers is not installed" in captured.err
    )


def check(run: PeerRun, build: str, prefill: str = "pp16") -> None:
    assert set(run.tests) == {prefill, "tg8"}
    assert all(len(test.samples_ns) == 2 and test.avg_ts > 0 for test in run.tests.values())
    assert run.build.startswith(build) and run.peak_rss > 2**26
