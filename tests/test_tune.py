"""`gemma-edge tune` with Pocket in both engines, here and behind a real sshd; which settings win is nobody's
business here: tests/test_tuned_settings.py gives the measurements.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_edge.benchmarks.measure import tune_job
from gemma_edge.benchmarks.measure.tuning_place import Processor, ThisMachine
from gemma_edge.benchmarks.peers import interleaved
from gemma_edge.export.checkpoint.checkpoint import revision_of
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.tuned_settings import TunedSettings, keep_tuned, tuned_settings

Said = Callable[..., tuple[int, str, str]]
QUICK = ("-p", "16", "-n", "2", "-r", "1", "--rounds", "2")
POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(interleaved, "busy_cores", lambda: None)  # it takes a second
    return tmp_path / "cache"


def identity(bundle: Path) -> str:
    return Bundle.open(bundle).identity


def test_bundles_of_both_engines_are_tuned_and_used(pocket_bundles: dict[str, Path], said: Said) -> None:
    code, out, err = said("tune", *pocket_bundles.values(), *QUICK)
    assert code == 0, err
    assert out.count("pocket-onnx") >= 2 and "pocket-tflite" in out and "default" in out and "chosen" in out
    assert "round 2/2: pocket-onnx" in err, "progress"
    found = {form: tuned_settings(identity(path)) for form, path in pocket_bundles.items()}
    assert all(settings is not None and settings.threads >= 1 for settings in found.values())
    best = tuned_settings(revision_of(str(POCKET)))
    assert best is not None and best.format in pocket_bundles and best.recipe == "int4"

    path = pocket_bundles["tflite"]
    keep_tuned(identity(path), TunedSettings(1, 128, 2.0, "a CPU", "yesterday"))
    _, _, err = said("run", path, "What is 2 + 3?", "--max-tokens", "2", "-v")
    assert '"event": "tuned"' in err and '"threads": 1' in err
    _, _, err = said("run", path, "What is 2 + 3?", "--max-tokens", "2", "-v", "--threads", "2")
    assert '"threads": 1' not in err
    bench = ["bench", path, "-p", "16", "-n", "2", "-r", "1", "--requests", "0", "--bandwidth", "0s"]
    bench += ["--no-cold", "--no-encode", "-o", "jsonl"]
    _, out, err = said(*bench)
    assert "1 threads, chunk 128: tuned, yesterday" in err
    assert {json.loads(line).get("n_threads", 1) for line in out.splitlines()} == {1}
    _, _, err = said(*bench, "-t", "2")
    assert "tuned" not in err

    assert said("tune", *pocket_bundles.values(), "--forget")[:2] == (0, "forgot 3 settings\n")
    assert said("tune", *pocket_bundles.values(), "--forget")[:2] == (0, "nothing was tuned\n")
    assert not [each for each in map(identity, pocket_bundles.values()) if tuned_settings(each)]


def test_what_is_measured_and_chosen_as_json(tiny_bundle: Path, said: Said) -> None:
    code, out, _ = said("tune", tiny_bundle, *QUICK, "--json")
    told = json.loads(out)
    assert code == 0 and told["machine"] and told["chosen"]["bundle"] == tiny_bundle.name
    assert all(len(trial["ratios"]) <= 2 and trial["prefill_ts"] > 0 for trial in told["trials"])
    (file,) = told["files"]
    assert json.loads(Path(file).read_text())["threads"] == told["chosen"]["threads"]


def test_a_dry_run_measures_and_keeps_nothing(
    pocket_bundles: dict[str, Path], said: Said, cache: Path
) -> None:
    code, out, _ = said("tune", *pocket_bundles.values(), "--dry-run")
    assert code == 0 and "pocket-onnx: " in out and "pocket-tflite: " in out and "chunk 128" in out
    assert said("tune", POCKET, "--dry-run", "--recipe", "int4", "--recipe", "int8")[:2] == (
        0,
        "onnx int4\nonnx int8\ntflite int4\ntflite int8\n",
    )
    assert list((cache / "tuned").iterdir()) == []


def test_a_checkpoint_is_tuned_and_exported_as_found(
    tiny_checkpoint: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    code, _, err = said("export", tiny_checkpoint, out, "--for", "local")
    assert code == 2 and "nothing was tuned there" in err and f"gemma-edge tune {tiny_checkpoint}" in err
    monkeypatch.setattr(ThisMachine, "processor", lambda _: Processor("one core", 1, 1, 1))
    words = ("--recipe", "int8", "--recipe", "fp32", "--format", "onnx")
    code, printed, err = said("tune", tiny_checkpoint, *words, *QUICK)
    assert code == 0, err
    assert "onnx int8" in printed and "onnx fp32" in printed and "--for local" in printed
    found = tuned_settings(revision_of(str(tiny_checkpoint)))
    assert found is not None and found.format == "onnx" and found.recipe in ("int8", "fp32")
    code, _, err = said("export", tiny_checkpoint, out, "--for", "local", "--context", "64", "--no-verify")
    assert code == 0, err
    assert Bundle.open(out).manifest["recipe"]["name"] == found.recipe
    code, _, err = said("export", tiny_checkpoint, out, "--for", "local", "--recipe", "int4")
    assert code == 2 and "--for chooses --recipe" in err
    code, _, err = said("run", tiny_checkpoint, "Hi", "--yes", "--max-tokens", "2")
    assert code == 0 and f"--format onnx --recipe {found.recipe}" in err


def test_a_device_behind_ssh_is_tuned_and_keeps_its_settings(
    device_url: str, pocket_bundles: dict[str, Path], said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = pocket_bundles["onnx"]
    code, _, err = said("tune", bundle, "--device", device_url, *QUICK)
    assert code == 0, err
    here = tuned_settings(identity(bundle), device_url)
    assert here is not None and tuned_settings(identity(bundle)) is None, "this machine was not tuned"
    there = Path(f"/{device_url.partition('//')[2].partition('/')[2]}") / "cache" / "tuned"
    (file,) = there.iterdir()
    assert json.loads(file.read_text())["threads"] == here.threads
    with monkeypatch.context() as patch:  # what `run --device` gives programs there
        patch.setenv("GEMMA_EDGE_CACHE", str(there.parent))
        assert tuned_settings(identity(bundle)) == here
    code, _, err = said(
        *("bench", bundle, "-p", "16", "-n", "2", "-r", "1", "--requests", "0", "--bandwidth", "0s"),
        *("--no-cold", "--no-encode", "--device", device_url),
    )
    assert code == 0 and f"{here.threads} threads, chunk {here.chunk}: tuned" in err
    assert said("tune", bundle, "--device", device_url, "--forget")[1] == "forgot 1 settings\n"
    assert list(there.iterdir()) == [] and tuned_settings(identity(bundle), device_url) is None


def test_an_interrupted_tuning_leaves_the_old_choice(
    tiny_bundle: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = TunedSettings(1, 32, 1.5, "a CPU", "yesterday")
    keep_tuned(identity(tiny_bundle), old)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_job, "tune", interrupted)
    assert said("tune", tiny_bundle, *QUICK)[0] == 130
    assert tuned_settings(identity(tiny_bundle)) == old


def test_what_cannot_be_tuned(
    tiny_bundle: Path,
    tmp_path: Path,
    said: Said,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_bundle, damaged)
    graph = damaged / "decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    for code, told, words in (
        (3, "decoder.onnx", (tiny_bundle, damaged, *QUICK)),
        (3, "no such file", (tmp_path / "none",)),
        (2, "--rounds must be 2 or more", (tiny_bundle, "--rounds", "1")),
        (2, "for a checkpoint", (tiny_bundle, "--recipe", "int8")),
        (2, "does not fit its context of 256", (tiny_bundle, "-p", "256", "-n", "1")),
        (2, "--device adb9", (tiny_bundle, "--device", "adb9")),
        (4, "ssh://nobody@127.0.0.1:9", (tiny_bundle, "--device", "ssh://nobody@127.0.0.1:9")),
    ):
        got, out, err = said("tune", *words)
        assert (got, out) == (code, "") and told in err and err.count("\n") == 1, err
    with monkeypatch.context() as patch:
        patch.setattr(ThisMachine, "__init__", lambda self: setattr(self, "formats", ("tflite",)))
        got, _, err = said("tune", tiny_bundle, *QUICK)
        assert got == 4 and "this machine has no engine for onnx; formats that it runs: tflite" in err
    shutil.rmtree(cache)
    cache.write_text("a file")
    got, _, err = said("tune", tiny_bundle)
    assert got == 1 and "takes no tuned settings" in err
