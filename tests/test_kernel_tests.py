"""Prefill and decode on scripted models, measurements, bandwidth, and how scripts end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gemma_edge.benchmarks.measure.kernel_tests import bench_decode, bench_prefill
from gemma_edge.benchmarks.records.measurement import Measurement, TurnSizes
from gemma_edge.benchmarks.records.run_report import RunReport
from gemma_edge.devices.machine import bandwidth, load
from gemma_edge.devices.machine.bandwidth import stream_read_bandwidth
from gemma_edge.devices.machine.child import ChildError, ChildRun
from gemma_edge.devices.machine.memory import PeakMemory
from gemma_edge.devices.script import run_script
from gemma_edge.runtime.errors import DeviceError, GemmaEdgeError, UsageError
from gemma_edge.runtime.files.typed_json import FieldError, from_json, to_json

MB = 2**20
HIDDEN, PLE_ROW, VOCAB = 8, 12, 50


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


# Kernel -----------------------------------------------------------------------------------------------


def test_prefill_feeds_all_tokens_in_chunks_from_an_empty_cache() -> None:
    model = scripted_model()
    result = bench_prefill(model, 16, reps=3, vocab_size=VOCAB)
    assert model.decoder.runs == [[6, 6, 4]] * 3
    assert model.decoder.logits == 3, "only the end of a prompt has use for logits"
    assert (result.test, result.n_prompt, result.n_gen, len(result.samples_ns)) == ("pp16", 16, 0, 3)


def test_decode_feeds_one_token_at_a_time_from_an_empty_cache() -> None:
    model = scripted_model()
    result = bench_decode(model, 5, reps=2, vocab_size=VOCAB)
    assert model.decoder.runs == [[1] * 5] * 2
    assert result.test == "tg5"


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
    assert from_json(Measurement, to_json(measurement)) == measurement


@pytest.mark.parametrize("samples", [[], [0], [-5], ["x"], None, [10**30], [True]])
def test_measurement_without_times_is_refused(samples: Any) -> None:
    with pytest.raises(FieldError, match="samples_ns"):
        from_json(Measurement, {"n_prompt": 1, "n_gen": 0, "samples_ns": samples})


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        (TurnSizes(n_prompt=0, n_gen=0), "-p and -n"),
        (TurnSizes(n_prompt=-1), "-p and -n"),
        (TurnSizes(reps=0), "-r, -t and --context"),
        (TurnSizes(n_prompt=5000), "5000 tokens do not fit a context of 4096"),
    ],
)
def test_sizes_that_cannot_be_measured(sizes: TurnSizes, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        sizes.check()


def test_failed_run_reports_no_number_and_keeps_its_exit_code() -> None:
    run = ChildRun(3, "{}", "warning\nbad bundle\n", 1.0, PeakMemory())
    with pytest.raises(ChildError, match="exit code 3: bad bundle") as caught:
        run.parse(RunReport, "the measured run")
    assert caught.value.exit_code == 3


def test_report_is_the_last_line() -> None:
    run = ChildRun(0, 'noise\n{"load_s": 2}\n', "", 1.0, PeakMemory())
    assert run.parse(RunReport, "the measured run").load_s == 2


# Bandwidth --------------------------------------------------------------------------------------------


def test_bandwidth_is_plausible_and_keeps_its_samples() -> None:
    result = stream_read_bandwidth(threads=2, seconds=0.1, bytes_per_thread=64 * MB)
    assert len(result.samples_gb_s) >= bandwidth.MIN_SAMPLES
    assert 0 < result.median_gb_s <= result.best_gb_s
    assert from_json(type(result), to_json(result)) == result


def test_bandwidth_buffers_stay_within_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_available_memory", lambda: 64 * MB)
    assert stream_read_bandwidth(threads=2, seconds=0).buffer_bytes == 8 * MB


def test_busy_cores_leave_out_idle_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(load, "PROC_STAT", stat)
    assert load.busy_cores(0) is None
    stat.write_text("cpu 100 0 0 900 0 0 0 0 0 0\ncpu0 1\ncpu1 1\nintr 5\n")
    later = "cpu 130 0 10 1040 10 0 0 10 99 0\ncpu0 1\ncpu1 1\n"  # 50 of 200 ticks busy, on 2 cores
    monkeypatch.setattr("gemma_edge.devices.machine.load.time.sleep", lambda _: stat.write_text(later))
    assert load.busy_cores() == 0.5


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
