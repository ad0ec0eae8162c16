"""Attacks on readers of small files: what hangs, what is endless, what says a size that nobody has.

Each was a hang, an exhausted memory, an error of Python's or one of several lines before it was ours.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.cli.main import main
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.shards import open_shard, read_into
from gemma_edge.export.checkpoint.tokenizer_files import convert
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    FileError,
    MediaError,
    TokenizerError,
    UsageError,
    printable,
)
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.files.text_files import MAX_TEXT_BYTES, read_json
from gemma_edge.runtime.media.recordings import read_audio
from gemma_edge.runtime.prompt.chat_template import ChatTemplate

USER = {"role": "user", "content": "x"}


def read_all(checkpoint: Checkpoint) -> None:
    for name in checkpoint.specs:
        checkpoint.read(name)


def config(**changes: Any) -> dict[str, Any]:
    return {"model_type": "gemma3n_text", **changes}


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


# Files that are none. ---------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
@pytest.mark.parametrize("make", [fifo, endless])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_never_ends(make: Callable[[Path], None], name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    make(checkpoint / name)
    if name == "config.json":
        with pytest.raises(ConfigError, match="a regular file"):
            Checkpoint.open(checkpoint)
    else:  # a side file that is no file is as if it were not there
        with Checkpoint.open(checkpoint) as opened:
            assert opened.generation_config() == {}


def test_a_manifest_of_gigabytes_is_not_read(bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(5 << 30)  # sparse
    with pytest.raises(BundleError, match=f"at most {MAX_TEXT_BYTES:,} bytes"):
        Bundle.open(bundle)


@pytest.mark.parametrize("text", ["9" * 5_000, "[" * 100_000, "\xff", "{", "[]"])
def test_json_that_python_chokes_on(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="JSON"):
        read_json(path, ConfigError)


# Sizes without end. -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "hidden_size", "vocab_size", "num_kv_shared_layers", "eos_token_id"]
)
def test_a_config_of_billions(field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Gemma3nConfig.from_dict(config(**{field: 2**31 - 1}))
    assert field in caught.value.field


def test_soft_tokens_of_billions() -> None:
    data = {"audio_config": {}, "text_config": {}, "audio_soft_tokens_per_image": 2**31 - 1}
    with pytest.raises(ConfigError, match="audio_soft_tokens_per_image"):
        AudioConfig.from_dict(data)


@pytest.mark.parametrize("shape", [[2**62, 2**62], [10**4000], [1] * 1000])
def test_a_tensor_of_more_than_any_disk(shape: list[int], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="x"):
        open_shard(path)


def test_hundreds_of_thousands_of_added_tokens() -> None:
    tokens = [{"id": i, "content": f"<t{i}>"} for i in range(300_000)]
    data = {
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {"<unk>": 0},
            "merges": [],
            "unk_token": "<unk>",
        }
    }
    data |= {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "added_tokens": tokens,
    }
    with pytest.raises(TokenizerError, match="at most 20,000"):
        convert(data, {}, Path("tokenizer.json"))


# Other types. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 5, ["x"], "x"])
def test_added_tokens_of_another_type(value: Any, checkpoint: Path) -> None:
    from gemma_edge.export.checkpoint.tokenizer_files import tokenizer_files

    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": value}))
    with Checkpoint.open(checkpoint) as opened, pytest.raises(TokenizerError, match="added_tokens_decoder"):
        tokenizer_files(opened)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
def test_a_name_that_no_file_can_have(name: str, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="a path inside the bundle"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.weight", "embed_tokens_per_layer.weight"])
@pytest.mark.parametrize(("bits", "expected"), [(0x7F7F, "at most 262144"), (0x7F80, "a finite weight")])
def test_a_weight_that_no_scale_holds_is_named(name: str, bits: int, expected: str, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = next(e for key, e in json.loads(data[8 : 8 + length]).items() if key.endswith(name))
    at = 8 + length + entry["data_offsets"][0]
    data[at : at + 2] = bits.to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=expected) as caught:
        export_bundle(checkpoint, checkpoint.parent / "out", recipe="int4", context=64, verify=False)
    assert name in caught.value.field


def test_a_checkpoint_that_becomes_shorter_while_it_is_read(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    with Checkpoint.open(checkpoint) as opened:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(
            CheckpointError, match=r"model.safetensors: .*expected \d+ bytes at \d+, got \d+ bytes"
        ):
            read_all(opened)


def test_a_shard_that_ends_within_a_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"x": {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    shard = open_shard(path)
    os.truncate(path, shard.size - 30)
    with pytest.raises(CheckpointError, match="got 70 bytes"):
        read_into(shard, memoryview(bytearray(100)), shard.size - 100, "x")
    os.close(shard.fd)


@pytest.mark.parametrize("level", [3e38, -1e30, float("inf")])
def test_sound_louder_than_any(level: float, tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    samples = np.full(8_000, level, "<f4").tobytes()
    head = struct.pack("<4sIHHIIHH4sI", b"fmt ", 16, 3, 1, 16_000, 64_000, 4, 32, b"data", len(samples))
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(head) + len(samples)) + b"WAVE" + head + samples)
    with pytest.raises(MediaError, match=r"finite numbers around -1 to 1, got .* at 0\.000 s"):
        list(read_audio(path))


# Messages. --------------------------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b]0;title\x07two\nlines\r\u202eabc\udcff" + "x" * 10_000


def test_a_message_repeats_little_and_on_one_line() -> None:
    error = FileError(HOSTILE[:50], HOSTILE, HOSTILE, HOSTILE)
    assert str(error).isprintable()
    assert len(str(error)) < 1_000
    assert "\\x1b[2J" in str(error) and "\\udcff" in str(error)
    assert len(printable(HOSTILE)) == 200
    assert str(UsageError(HOSTILE[:40])).isprintable()


def test_a_refusal_of_the_template_is_one_line() -> None:
    source = "{{ raise_exception(messages[0].content) }}"
    with pytest.raises(UsageError) as caught:
        ChatTemplate(source).render([{"role": "user", "content": HOSTILE.replace("\udcff", "")}])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_no_escape_of_a_manifest_reaches_the_terminal(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["source"]["name"] = HOSTILE
    manifest["plan"]["recipe"] = HOSTILE
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert max(map(len, out.splitlines())) < 1_000


@pytest.mark.parametrize(
    "plan", [{"parts": [5]}, {"parts": "x"}, {"parts": [{"part": []}]}, {"context": "a"}]
)
def test_a_plan_of_another_shape(
    plan: dict[str, Any], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["plan"] |= plan
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(bundle)]) == 3
    assert "plan" in capsys.readouterr().err


# Names of files on the command line. ------------------------------------------------------------------


def test_a_bundle_whose_name_begins_with_a_dash(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bundle.parent)
    bundle.rename("-dash")
    assert main(["inspect", "--", "-dash"]) == 0
    assert "predicted" in capsys.readouterr().out


def test_a_name_that_is_not_utf8(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = os.fsdecode(os.fsencode(bundle) + b"\xff")
    bundle.rename(renamed)
    assert main(["inspect", renamed]) == 3
    assert "a name in UTF-8" in capsys.readouterr().err
