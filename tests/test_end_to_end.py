"""The command as a user types it: synth, export, inspect, verify, run, chat; and every way it can go wrong.

Almost all are processes of their own. Wherever one ends, stderr holds no traceback, and no half bundle is
left.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from gemma_edge.cli.main import main
from gemma_edge.export.exporter import INT8_CACHE_BOUNDS, export_bundle
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.synth.synth_gemma3n import text_config
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.model import Model
from support import small_disk as disk
from support.margins import FP32, assert_decided
from support.processes import PATIENCE_S, children, wait_for
from support.random_gemma3n_text import random_ids, transformers_logits
from support.refused_inputs import poke

COMMAND = Path(sys.executable).with_name("gemma-edge")
Result = subprocess.CompletedProcess[str]


def gemma_edge(
    *arguments: str | Path, stdin: str = "", code: int = 0, command: Sequence[str | Path] = (COMMAND,)
) -> Result:
    """Runs the command, which must end with `code`."""
    argv = [*command, *arguments]
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr
    if code:
        assert done.stderr.count("gemma-edge: error: ") == 1
    return done


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# From a checkpoint to text. -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ckpt/ made by `synth`; out/ made of it by `export` as it is by default."""
    home = tmp_path_factory.mktemp("home")
    made = gemma_edge("synth", home / "ckpt")
    assert "parameters" in made.stdout and made.stderr == ""
    ready = gemma_edge("export", home / "ckpt", home / "out", "--context", "256")
    assert "Next: gemma-edge run" in ready.stdout
    assert "decoder layers" in ready.stderr and "agreement over" in ready.stderr
    assert "--calibrate none rounds them to the nearest" in ready.stderr and "calibrated in" in ready.stderr
    return home


def test_dry_run_prints_the_plan_and_stops(home: Path) -> None:
    shown = gemma_edge("export", home / "ckpt", "--dry-run", "--recipe", "maximum_efficiency")
    assert "recipe int4_g128" in shown.stdout and "peak" in shown.stdout and shown.stderr == ""
    plan = json.loads(gemma_edge("export", home / "ckpt", home / "no", "--dry-run", "--json").stdout)
    assert plan["context"] == 4096 and plan["peak_bytes"] > 0
    assert names(home) == ["ckpt", "out"]


def test_export_reports_json(home: Path, tmp_path: Path) -> None:
    argv = ("--recipe", "fp32", "--kv-cache", "int8", "--context", "64", "--json")
    report = json.loads(gemma_edge("export", home / "ckpt", tmp_path / "out", *argv).stdout)
    assert report["path"] == str(tmp_path / "out")
    # The cache costs more than the recipe's own bounds allow, and no more than its bounds for that.
    assert report["plan"]["recipe"] == "fp32"
    assert (
        report["agreement"]["max_abs"] > 1e-3 and report["agreement"]["mean_kl"] <= INT8_CACHE_BOUNDS.mean_kl
    )
    text = gemma_edge("inspect", tmp_path / "out").stdout
    assert "KV cache int8" in text and "agreement over" in text


def test_inspect(home: Path) -> None:
    text = gemma_edge("inspect", home / "out", "--check").stdout
    for words in (
        "decoder layers",
        "mapped",
        "resident",
        "KV cache, 256 tokens",
        "every file has the recorded SHA-256",
    ):
        assert words in text
    data = json.loads(gemma_edge("inspect", home / "out", "--json").stdout)
    assert (
        data["plan"]["recipe"] == "int4_g128"
        and data["agreement"]["tokens"] > 0
        and "ple.bin" in data["files"]
    )


def test_verify(home: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Perplexity is taken on this text, which is about nothing. " * 4)
    argv = ("verify", home / "out", "--source", home / "ckpt", "--text", text, "--tokens", "50")
    done = gemma_edge(*argv)
    assert "agreement over 50 tokens" in done.stdout and "checked: " in done.stdout
    failed = gemma_edge(*argv, "--max-kl", "1e-6", "--json", code=6)
    assert json.loads(failed.stdout)["tokens"] == 50
    assert "does not agree with its checkpoint: mean KL" in failed.stderr


def test_run_greedily(home: Path) -> None:
    """The same answer as JSON and streamed, to a prompt that is an argument or piped."""
    options = ("--temperature", "0", "--max-tokens", "12", "-s", "Be brief.", "--threads", "1")
    answer = json.loads(gemma_edge("run", home / "out", "Hello", *options, "--json").stdout)
    assert 0 < answer["usage"]["completion_tokens"] <= 12 and answer["finish_reason"] in ("stop", "length")
    streamed = gemma_edge("run", home / "out", *options, "-u", stdin="Hello")
    assert streamed.stdout.rstrip("\n") == answer["text"].rstrip("\n")
    assert f"prompt {answer['usage']['prompt_tokens']} tokens" in streamed.stderr
    assert f"answer {answer['usage']['completion_tokens']} tokens" in streamed.stderr


def test_chat_from_a_pipe(home: Path) -> None:
    options = ("--temperature", "0", "--max-tokens", "6", "--json", "--threads", "1")
    done = gemma_edge("chat", home / "out", *options, stdin="Hello\nAnd again\n")
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    # The second prompt holds the first one and its answer.
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + 6


# What can go wrong, and the exit code it ends with. -----------------------------------------------


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, in a folder of its own."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source" / "ckpt"))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where a bundle would be; at the end nothing may be there."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder / "out"
    assert names(folder) == []


def test_unknown_recipe(tiny_checkpoint: Path, out: Path) -> None:
    done = gemma_edge("export", tiny_checkpoint, out, "--recipe", "int5", code=2)
    assert "unknown recipe 'int5'" in done.stderr and "maximum_efficiency" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "ckpt"), "name the folder of the bundle"),
        (("export", "no/such/folder", "out"), "neither a checkpoint folder nor a Hugging Face id"),
        (("export", "CKPT", "out", "--ceiling", "2G"), "say 2GiB"),
        (("export", "CKPT", "out", "--context", "99999"), "--context must be 1 to 4096"),
        (("verify", "out", "--source", "CKPT", "--tokens", "1"), "--tokens must be 2 or more"),
        (("run", "BUNDLE", "hello " * 200), "too long. Shorten it"),
        (("run", "BUNDLE"), "no prompt"),
        (("run", "BUNDLE", "x", "--top-p", "2"), "top_p must be"),
        (("chat", "BUNDLE", "--context", "5000"), "context must be 1 to 4096"),
    ],
)
def test_requests_that_cannot_be_served(
    arguments: tuple[str, ...],
    message: str,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    places = {"CKPT": str(tiny_checkpoint), "BUNDLE": str(tiny_bundle)}
    assert main([places.get(a, a) for a in arguments]) == 2
    assert message in capsys.readouterr().err


def test_nan_weights(checkpoint: Path, out: Path) -> None:
    poke(checkpoint, "layers.6.mlp.down_proj.weight", 4)
    done = gemma_edge("export", checkpoint, out, code=3)
    assert (
        "model.language_model.layers.6.mlp.down_proj.weight[0, 4]: expected a finite weight, got nan"
        in done.stderr
    )


def test_truncated_shard(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_edge.export.checkpoint import new_checkpoint

    monkeypatch.setattr(new_checkpoint, "SHARD_BYTES", 1_500_000)
    sharded = synthesize(checkpoint.with_name("sharded"), progress=False).path
    shard = sorted(sharded.glob("model-00002-of-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard}: file: expected" in gemma_edge("export", sharded, out, code=3).stderr


def test_config_contradicting_the_tensors(checkpoint: Path, out: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"laurel_rank": 16', '"laurel_rank": 8'))
    done = gemma_edge("export", checkpoint, out, code=3)
    assert "laurel.linear_left.weight: expected shape (8, 128), got (16, 128)" in done.stderr


def test_damaged_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "ple.bin").unlink()
    assert "ple.bin: file: expected" in gemma_edge("run", bundle, "Hello", code=3).stderr


def test_ceiling(out: Path, tmp_path: Path) -> None:
    """config.json alone is enough to plan a model of true size."""
    (tmp_path / "config.json").write_text(json.dumps(text_config("e2b")))
    argv = ("export", tmp_path, out, "--recipe", "int8", "--ceiling", "2GiB")
    error = gemma_edge(*argv, code=5).stderr
    assert "recipe int8 with a context of 4096 needs" in error and "the ceiling is 2 GiB" in error
    assert "What would fit: " in error and "--recipe int4" in error


def test_parity(tiny_checkpoint: Path, out: Path) -> None:
    done = gemma_edge("export", tiny_checkpoint, out, "--max-kl", "1e-5", "--context", "64", code=6)
    assert "Nothing was published" in done.stderr and "--no-verify publishes as it is" in done.stderr


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose export takes a moment: its per-layer table has 2^16 columns."""
    folder = tmp_path_factory.mktemp("larger") / "ckpt"
    config = {"hidden_size_per_layer_input": 2048, "vocab_size": 2000, "vocab_size_per_layer_input": 1500}
    return synthesize(folder, config=config, progress=False).path


@pytest.mark.parametrize("moment", ["weights", "gate"])
def test_ctrl_c(moment: str, larger: Path, out: Path) -> None:
    """While weights are written, and while the gate compares: its engine, a process of its own, gets the
    signal too, as at a terminal.
    """
    argv = [str(a) for a in (COMMAND, "export", larger, out, "--context", "64", "--calibrate", "none")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    partial = out.parent / f".out.partial-{process.pid}"
    awaited = partial / ("decoder.onnx.data" if moment == "weights" else "manifest.json")
    wait_for(lambda: awaited.exists() or process.poll() is not None, "it never came so far")
    if moment == "gate":
        wait_for(lambda: children(process.pid) or process.poll() is not None, "no engine was started")
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "gemma-edge: interrupted" in error and "Traceback" not in error


def test_disk_without_room(tiny_checkpoint: Path, small_disk: Path) -> None:
    error = gemma_edge("export", tiny_checkpoint, small_disk / "out", "--context", "64", code=1).stderr
    assert "bytes of disk" in error and "are free; free some" in error
    assert names(small_disk) == []


# As if there had been room when it was looked for, but others wrote too.
NO_CHECK = """\
import resource, sys
from gemma_edge.cli.main import main
from gemma_edge.export.publish import BundleWriter
BundleWriter.check_room = lambda self, needed: None
if sys.argv[1] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def test_disk_full_in_the_middle(tiny_checkpoint: Path, small_disk: Path) -> None:
    command = (sys.executable, "-c", NO_CHECK, "0")
    argv = (
        "export",
        tiny_checkpoint,
        small_disk / "out",
        "--context",
        "64",
        "--recipe",
        "fp32",
        "--no-verify",
    )
    error = gemma_edge(*argv, code=1, command=command).stderr
    assert "the disk is full" in error and "Free some space, or write elsewhere." in error
    assert names(small_disk) == []


def test_file_too_large_in_the_middle(tiny_checkpoint: Path, out: Path) -> None:
    command = (sys.executable, "-c", NO_CHECK, str(1 << 20))
    argv = ("export", tiny_checkpoint, out, "--context", "64", "--recipe", "fp32", "--no-verify")
    assert "File too large" in gemma_edge(*argv, code=1, command=command).stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with disk.small_disk(tmp_path / "small", megabytes=2) as folder:
        yield folder


# Against transformers, by its own loader and its own generation. ----------------------------------


def test_greedy_64_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """Whatever the prefill chunks, and through an answer that is longer than the window."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)  # so small that threads only wait for each other
    checkpoint = synthesize(tmp_path / "ckpt", multimodal_layout=False, progress=False).path
    theirs = transformers.Gemma3nForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    theirs.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=64)
    path = export_bundle(
        checkpoint, tmp_path / "out", recipe="fp32", context=256, chunk=64, verify=False
    ).path
    model, config = Model.load(path, threads=1), Gemma3nConfig.from_file(checkpoint)
    for seed, length in ((0, 50), (1, 3)):
        prompt = random_ids(config, length, seed)
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([prompt]))[0, length:].tolist()
        assert len(expected) == 64 and len(set(expected)) > 8
        assert_decided(transformers_logits(theirs, [*prompt, *expected])[length - 1 : -1], FP32)
        for chunk in (64, 33, 7, 1):
            model.reset()
            model.decoder.chunk = chunk
            assert list(model.stream_tokens(prompt, max_tokens=64)) == expected, chunk
    ids = random_ids(config, 60, seed=2)
    model.reset()
    model.decoder.chunk = 64
    rows = model.embeddings.lookup(np.array(ids)), model.per_layer.lookup(np.array(ids))
    assert abs(model.decoder.forward(*rows, 60) - transformers_logits(theirs, ids)).max() <= 1e-3
