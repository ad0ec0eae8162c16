"""Synthetic checkpoints: true layout, loadable by transformers, deterministic, all tensors different."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import numpy as np
import pytest
import sentencepiece

from gemma_edge.cli import synth as verb
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.sentencepiece_model import build_model, synthetic_pieces
from gemma_edge.export.synth import synth_checkpoint as synth
from gemma_edge.export.synth.synth_gemma3n import random_tensors, text_config
from gemma_edge.runtime.errors import ConfigError, GemmaEdgeError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.synthesize(tmp_path_factory.mktemp("synth") / "tiny").path


def test_transformers_loads_the_text_layout_with_our_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = synth.synthesize(tmp_path / "text", multimodal_layout=False).path
    model, info = transformers.Gemma3nForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    with Checkpoint.open(path) as checkpoint:
        for name in checkpoint.specs:
            np.testing.assert_array_equal(checkpoint.read(name), state[f"model.{name}"].numpy(), err_msg=name)
    with torch.no_grad():
        output = model(torch.arange(200)[None], output_hidden_states=True)
    assert 2 < output.logits.std() < 6 and output.logits.abs().max() < 25  # the softcap is at 30
    assert all(0.5 < hidden.std() < 10 for hidden in output.hidden_states)


def test_tiny_has_every_mechanism(tiny: Path) -> None:
    config = Gemma3nConfig.from_file(tiny)
    assert config.num_kv_shared_layers == 5 and len(set(config.intermediate_size)) > 1
    assert {config.is_sliding(i) for i in config.kv_layers} == {True, False}
    shared = range(config.first_shared_layer, config.num_hidden_layers)
    assert {config.is_sliding(i) for i in shared} == {True, False}
    assert config.activation_sparsity == (0.95,) * 4 + (0.0,) * 8
    assert config.vocab_size > config.vocab_size_per_layer_input
    assert config.eos_token_ids == (1, 106)


@pytest.mark.parametrize(
    ("size", "layers", "width", "owners", "sparse", "parameters"),
    [("e2b", 30, 8192, 20, 10, 4_456_156_768), ("e4b", 35, 16384, 20, 10, None)],
)
def test_published_shapes(
    size: str, layers: int, width: int, owners: int, sparse: int, parameters: int | None
) -> None:
    config = Gemma3nConfig.from_dict(text_config(size))
    assert config.num_hidden_layers == layers and set(config.intermediate_size) == {width}
    assert len(config.kv_layers) == owners
    assert config.activation_sparsity == (0.95,) * sparse + (0.0,) * (layers - sparse)
    assert (config.vocab_size, config.vocab_size_per_layer_input) == (262_400, 262_144)
    total = sum(math.prod(shape) for _, shape, _, _ in random_tensors(config))
    assert total == parameters or (parameters is None and 6.8e9 < total < 6.95e9)


def test_shared_layers_keep_their_unused_weights(tiny: Path) -> None:
    header = (tiny / "model.safetensors").read_bytes()[:100_000]
    assert b"model.language_model.layers.11.self_attn.k_proj.weight" in header
    assert b"model.language_model.layers.11.self_attn.v_proj.weight" in header


def test_tensors_and_blocks_differ_and_the_seed_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "BLOCK", 20_000)  # several blocks a tensor, the last one short
    paths = [synth.synthesize(tmp_path / str(i), seed=seed).path for i, seed in enumerate((7, 7, 8))]
    raw = [(path / "model.safetensors").read_bytes() for path in paths]
    assert raw[0] == raw[1] != raw[2]
    with Checkpoint.open(paths[0]) as checkpoint:
        contents = {checkpoint.read(name).tobytes() for name in checkpoint.specs}
        assert len(contents) == len(checkpoint.specs)
        rows = checkpoint.read("embed_tokens.weight")
        assert len({row.tobytes() for row in rows}) == len(rows)
        assert rows.std() == pytest.approx(128**-0.5, rel=0.02)
        assert checkpoint.read("norm.weight").std() == pytest.approx(4, rel=0.25)


def test_config_fields_can_be_replaced(tmp_path: Path) -> None:
    changes = {
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 0,
        "num_key_value_heads": 1,
        "altup_num_inputs": 3,
        "attention_bias": True,
        "intermediate_size": 64,
        "layer_types": None,
        "activation_sparsity_pattern": None,
        "tie_word_embeddings": False,
    }
    path = synth.synthesize(tmp_path / "other", config=changes).path
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.config.altup_num_inputs == 3 and not checkpoint.config.tie_word_embeddings
        assert checkpoint.read("layers.2.self_attn.k_proj.bias").shape == (32,)
    with pytest.raises(ConfigError, match="layer_types"):
        synth.synthesize(tmp_path / "bad", config={"num_hidden_layers": 3})
    with pytest.raises(UsageError, match="pieces or more"):
        synth.synthesize(tmp_path / "small", config={"vocab_size": 300})
    assert [child.name for child in tmp_path.iterdir()] == ["other"]


# Side files. --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [512, 262_144])
def test_the_tokenizer_round_trips_any_text(count: int) -> None:
    pieces = synthetic_pieces(count)
    assert len(pieces) == count == len({piece.text for piece in pieces})
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=build_model(pieces))
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.unk_id()) == (0, 1, 2, 3)
    for text in ("The thing and  the ring.\n\n\tok", " leading", "héllo 你好 🙂\x00", "", "<0x41>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<start_of_turn>the<end_of_turn>") == [105, tokenizer.piece_to_id("the"), 106]
    assert len(tokenizer.encode(" the")) == 1
    if count == 262_144:
        assert tokenizer.piece_to_id("<0x00>") == 238 and tokenizer.piece_to_id("<start_of_image>") == 255_999


def test_the_chat_template_writes_gemma_turns(tiny: Path) -> None:
    def refuse(message: str) -> None:
        raise ValueError(message)

    template = jinja2.Environment().from_string((tiny / "chat_template.jinja").read_text())

    def render(*turns: tuple[str, object], prompt: bool = True) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return template.render(
            messages=messages, bos_token="<bos>", add_generation_prompt=prompt, raise_exception=refuse
        )

    assert render(("user", " hi ")) == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    assert render(("system", "Be brief."), ("user", parts), ("assistant", "No."), prompt=False) == (
        "<bos><start_of_turn>user\nBe brief.\n\n<image_soft_token>what?<end_of_turn>\n"
        "<start_of_turn>model\nNo.<end_of_turn>\n"
    )
    with pytest.raises(ValueError, match="must alternate"):
        render(("user", "a"), ("user", "b"))


def test_soft_tokens_lie_beyond_the_tokenizer(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    added = json.loads((tiny / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert added[str(config["image_token_id"])]["content"] == "<image_soft_token>"
    assert added[str(config["audio_token_id"])]["content"] == "<audio_soft_token>"
    assert added[str(config["boi_token_id"])]["content"] == "<start_of_image>"
    assert config["vision_config"]["vocab_offset"] == 512 and config["audio_config"]["vocab_offset"] == 528


# What is refused, and what is left behind. --------------------------------------------------------


def test_a_folder_with_files_is_not_overwritten_but_an_empty_one_is_used(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for target in (tmp_path / "mine", tmp_path / "mine" / "file"):
        with pytest.raises(UsageError, match="not an empty folder"):
            synth.synthesize(target)
    with pytest.raises(UsageError, match="tiny, e2b, e4b"):
        synth.synthesize(tmp_path / "x", "e9b")
    (tmp_path / "empty").mkdir()
    synth.synthesize(tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_disk_that_is_too_small_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(GemmaEdgeError, match=r"0\.0 GB needed, 0\.0 GB free") as caught:
        synth.synthesize(tmp_path / "a")
    assert caught.value.exit_code == 1 and not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        if offset < 2_000_000:
            return pwrite(fd, data, offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(GemmaEdgeError, match="No space left"):
        synth.synthesize(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synth, "random_block", interrupt)
    with pytest.raises(KeyboardInterrupt):
        synth.synthesize(tmp_path / "a")
    assert not list(tmp_path.iterdir())


MEMORY_SCRIPT = """
import sys
from gemma_edge.export.synth.synth_checkpoint import synthesize
def peak():  # ru_maxrss would begin with that of the process which started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
made = synthesize(sys.argv[1], config={"vocab_size": 1_000_000, "vocab_size_per_layer_input": 512})
print(made.bytes, 1024 * (peak() - before))
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "wide")]
    written, grown = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert written > 250_000_000 and grown < 150_000_000


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    verb.configure(parser)
    assert (
        verb.run(parser.parse_args([str(tmp_path / "out"), "--size", "tiny", "--seed", "3", "--text-only"]))
        == 0
    )
    captured = capsys.readouterr()
    assert "2,744,160 parameters, 5,488,320 bytes" in captured.out and captured.err == ""
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3n_text"
    with pytest.raises(UsageError, match="--seed -1"):
        verb.run(parser.parse_args([str(tmp_path / "no"), "--seed", "-1"]))
