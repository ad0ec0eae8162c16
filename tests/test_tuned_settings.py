"""Tuned settings: kept for a bundle and a machine, used where no option says else, chosen beyond doubt."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.measure.tuning import (
    Candidate,
    Trial,
    Tuned,
    compare,
    first_candidates,
    thread_counts,
    tune,
)
from gemma_edge.benchmarks.measure.tuning_place import Processor
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.peers import interleaved
from gemma_edge.benchmarks.records.measurement import KernelTest, TurnSizes
from gemma_edge.benchmarks.records.run_report import RunReport
from gemma_edge.runtime import tuned_settings as tuned_settings_file
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import DeviceError, GemmaEdgeError, UsageError
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.tuned_settings import (
    TunedSettings,
    check_keeping,
    forget_tuned,
    keep_tuned,
    tuned_for_another_machine,
    tuned_settings,
)

SETTINGS = TunedSettings(1, 16, 1.25, "a CPU", "2026-11-22T06:00:00+00:00")
SUBJECT, DEVICE = "ab" * 32, "ssh://pi@board"
SIZES = TurnSizes(128, 8, 1, 1, 256)
CPU = Processor("a CPU", 2, 2, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(interleaved, "busy_cores", lambda: None)  # it takes a second
    return tmp_path / "cache"


def test_settings_are_kept_for_a_subject_and_a_place_until_they_are_forgotten() -> None:
    assert tuned_settings(SUBJECT) is None and not forget_tuned(SUBJECT)
    path = keep_tuned(SUBJECT, SETTINGS)
    keep_tuned(SUBJECT, replace(SETTINGS, threads=4), DEVICE)
    assert tuned_settings(SUBJECT) == SETTINGS and tuned_settings("cd" * 32) is None
    there = tuned_settings(SUBJECT, DEVICE)
    assert there is not None and there.threads == 4
    assert forget_tuned(SUBJECT) and not path.exists()
    assert tuned_settings(SUBJECT) is None and tuned_settings(SUBJECT, DEVICE) == there


@pytest.mark.parametrize("damage", ["", "[]", '{"threads": 0', "nonsense", '{"threads": "two"}'])
def test_a_damaged_file_is_no_settings(damage: str) -> None:
    keep_tuned(SUBJECT, SETTINGS).write_text(damage)
    assert tuned_settings(SUBJECT) is None


@pytest.mark.parametrize("change", [{"threads": 0}, {"threads": 10**9}, {"chunk": 0}])
def test_settings_out_of_range_are_not_used(change: dict[str, Any]) -> None:
    keep_tuned(SUBJECT, replace(SETTINGS, **change))
    assert tuned_settings(SUBJECT) is None


def test_another_cpu_or_number_of_cores_has_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_tuned(SUBJECT, SETTINGS)
    for name, value in (("cpu_name", "another"), ("cpu_fingerprint", "0"), ("physical_cores", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(tuned_settings_file, name, lambda value=value: value)
            assert tuned_settings(SUBJECT) is None and tuned_for_another_machine(SUBJECT)
    assert tuned_settings(SUBJECT) == SETTINGS and not tuned_for_another_machine(SUBJECT)


def test_a_cache_folder_that_takes_nothing_is_told_before_anything_is_measured(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file")  # also for root, whom no permission stops
    with pytest.raises(GemmaEdgeError, match=r"takes no tuned settings: .*Set GEMMA_EDGE_CACHE"):
        check_keeping()
    monkeypatch.setenv("GEMMA_EDGE_CACHE", f"{cache}-2")
    check_keeping()
    assert list((Path(f"{cache}-2") / "tuned").iterdir()) == []


# A model that is loaded. --------------------------------------------------------------------------


def test_a_model_is_loaded_as_tuned_unless_an_option_says_otherwise(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep_tuned(Bundle.open(tiny_bundle).identity, SETTINGS)
    with caplog.at_level(logging.INFO, "gemma_edge"), Model.load(tiny_bundle) as model:
        assert model.decoder.chunk == 16
        answer = model.generate("Why?", max_tokens=3, temperature=0).text
    told = [record.fields for record in caplog.records if record.fields["event"] == "tuned"]  # type: ignore[attr-defined]
    assert [(each["threads"], each["chunk"]) for each in told] == [(1, 16)]
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, "gemma_edge"),
        Model.load(tiny_bundle, threads=2, chunk=64) as model,
    ):
        assert model.decoder.chunk == 64
        assert model.generate("Why?", max_tokens=3, temperature=0).text == answer
    assert not [record for record in caplog.records if '"event": "tuned"' in record.getMessage()]


def test_a_bundle_that_changed_is_not_tuned(tiny_bundle: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_bundle, changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["chunk"] = 32
    (changed / "manifest.json").write_text(json.dumps(manifest))
    keep_tuned(Bundle.open(tiny_bundle).identity, SETTINGS)
    with Model.load(changed) as model:
        assert model.decoder.chunk == 32


def test_settings_of_another_machine_are_told_in_the_log(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_tuned(Bundle.open(tiny_bundle).identity, SETTINGS)
    monkeypatch.setattr(tuned_settings_file, "cpu_name", lambda: "another")
    with caplog.at_level(logging.INFO, "gemma_edge"), Model.load(tiny_bundle) as model:
        assert model.decoder.chunk == 64
    assert "tuned for another CPU" in caplog.text


def test_a_chunk_beyond_the_bundles_is_refused(tiny_bundle: Path) -> None:
    for chunk in (0, 65):
        with pytest.raises(UsageError, match=f"chunk must be 1 to 64, .* not {chunk}"):
            Model.load(tiny_bundle, chunk=chunk)


# The choice, from measurements that are given. ----------------------------------------------------


def report(seconds: float) -> RunReport:
    """A turn of SIZES that takes so long."""
    half = round(seconds / 2 * 1e9)
    return RunReport(tests=(KernelTest(128, 0, (half,)), KernelTest(0, 8, (half,))))


class Given:
    """Seconds of a turn of each candidate, round by round; notes who was measured."""

    def __init__(self, seconds: Callable[[Candidate], Sequence[float]]) -> None:
        self.seconds, self.asked = seconds, list[Candidate]()

    def __call__(self, candidate: Candidate, workload: Workload) -> RunReport:
        assert (workload.threads, workload.chunk) == (candidate.threads, candidate.chunk)
        times = self.seconds(candidate)
        found = times[min(self.asked.count(candidate), len(times) - 1)]
        self.asked.append(candidate)
        return report(found)


def by_threads(default: Sequence[float], one: Sequence[float]) -> Given:
    return Given(lambda candidate: default if candidate.threads == 2 else one)


def candidates(bundle: Path) -> list[Candidate]:
    return first_candidates([(bundle, "out")], CPU)


def chosen(bundle: Path, given: Given, rounds: int = 3) -> Tuned:
    return tune(candidates(bundle), SIZES, rounds, given)


def test_threads_to_try_begin_with_the_default() -> None:
    assert thread_counts(CPU) == [2, 1]
    assert thread_counts(Processor("big and little", 8, 8, 4)) == [8, 4, 6, 1]
    assert thread_counts(Processor("two threads a core", 4, 8, 8)) == [4, 8, 6, 1]


@pytest.mark.parametrize(
    ("default", "one", "threads"),
    [
        ([1.0, 1.0, 1.0], [0.8, 0.8, 0.8], 1),
        ([1.0, 1.0, 1.0], [0.99, 0.99, 0.99], 2),  # not worth a setting
        ([1.0, 1.0, 1.0], [0.8, 1.1, 0.8], 2),  # within the noise
        ([1.0, 2.0, 4.0], [0.8, 1.6, 3.2], 1),  # a machine that slows down slows both
        ([1.0, 2.0, 4.0], [1.05, 2.1, 4.2], 2),
        ([1.0, 1.0, 1.0], [3.0, 0.1, 0.1], 2),  # left out after its first round
    ],
)
def test_another_setting_is_chosen_only_beyond_the_noise(
    engine_bundle: Path, default: list[float], one: list[float], threads: int
) -> None:
    tuned = chosen(engine_bundle, by_threads(default, one))
    assert tuned.best.threads == threads
    assert tuned.gain == pytest.approx(1.25 if threads == 1 else 1.0)
    (pick,) = tuned.picks
    assert pick.candidate == tuned.best and pick.gain == pytest.approx(tuned.gain)


def test_what_is_clearly_slower_is_measured_once(engine_bundle: Path) -> None:
    given = by_threads([1.0], [2.0])
    trials = compare(candidates(engine_bundle), SIZES, 3, given)
    assert [candidate.threads for candidate in given.asked] == [2, 1, 2, 2]
    assert [trial.left_out for trial in trials] == ["", "clearly slower"]
    assert trials[1].ratio == pytest.approx(0.5) and not trials[1].is_quicker


def test_rounds_are_interleaved_in_opposite_orders(engine_bundle: Path) -> None:
    given = by_threads([1.0], [0.9])
    compare(candidates(engine_bundle), SIZES, 3, given)
    assert [candidate.threads for candidate in given.asked] == [2, 1, 1, 2, 2, 1]


def test_a_setting_that_cannot_run_is_left_out_with_its_reason(engine_bundle: Path) -> None:
    def work(candidate: Candidate, workload: Workload) -> RunReport:
        if candidate.threads == 1:
            raise DeviceError("it hangs")
        return report(1.0)

    tuned = tune(candidates(engine_bundle), SIZES, 2, work)
    assert tuned.best.threads == 2
    assert [trial.left_out for trial in tuned.trials if trial.candidate.threads == 1] == ["it hangs"]


def test_a_default_that_cannot_run_is_an_error(engine_bundle: Path) -> None:
    def work(candidate: Candidate, workload: Workload) -> RunReport:
        raise DeviceError("it hangs")

    with pytest.raises(DeviceError, match="it hangs"):
        tune(candidates(engine_bundle), SIZES, 2, work)


def test_smaller_chunks_are_tried_with_the_chosen_threads_where_calls_have_any_size(
    engine_bundle: Path,
) -> None:
    seconds = {(2, 128): 1.0, (1, 128): 0.5, (1, 64): 0.4, (1, 32): 0.6}
    given = Given(lambda candidate: [seconds[candidate.threads, candidate.chunk]])
    tuned = chosen(engine_bundle, given)
    tried = {trial.candidate.chunk for trial in tuned.trials}
    if Bundle.open(engine_bundle).format == "tflite":
        assert tried == {128} and tuned.best.threads == 1 and tuned.gain == pytest.approx(2)
        return
    assert tried == {128, 64, 32} and (tuned.best.threads, tuned.best.chunk) == (1, 64)
    assert tuned.gain == pytest.approx(2.5) and tuned.picks[0].gain == pytest.approx(2.5)
    ratios = {trial.candidate.chunk: trial.ratio for trial in tuned.trials if trial.candidate.threads == 1}
    assert ratios == pytest.approx({128: 2.0, 64: 2.5, 32: 1 / 0.6}), "all beside the first default"


def test_each_of_several_bundles_gets_its_own_settings(engine_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(engine_bundle, other)
    seconds = {("a", 2): 1.0, ("a", 1): 0.9, ("b", 2): 0.6, ("b", 1): 0.7}
    both = first_candidates([(engine_bundle, "a"), (other, "b")], CPU)
    given = Given(lambda candidate: [seconds[candidate.label, candidate.threads]])
    tuned = tune(both, replace(SIZES, n_prompt=16), 2, given)
    assert (tuned.best.label, tuned.best.threads) == ("b", 2)
    assert tuned.gain == pytest.approx(1 / 0.6)
    assert [(pick.candidate.label, pick.candidate.threads) for pick in tuned.picks] == [("a", 1), ("b", 2)]
    assert [pick.gain for pick in tuned.picks] == pytest.approx([1 / 0.9, 1.0])


def test_one_round_is_never_beyond_doubt(tiny_bundle: Path) -> None:
    first = candidates(tiny_bundle)[0]
    assert not Trial(first, ratios=[9.0]).is_quicker
    assert Trial(first, ratios=[1.2, 1.25]).is_quicker


def test_the_cache_is_the_users_own_folder(cache: Path) -> None:
    path = keep_tuned(SUBJECT, SETTINGS)
    assert path.parent == cache / "tuned" and os.listdir(cache) == ["tuned"]
