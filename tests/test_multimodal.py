"""End to end: text, two pictures and a recording over two turns give the tokens that transformers gives."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime import residency
from gemma_edge.runtime.engines.deferred_decoder import DeferredDecoder
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.prompt_builder import Prompt
from gemma_edge.runtime.usage import GenerationProgress
from support.audio_clips import write_wav
from support.margins import FP32, assert_decided, recorded
from support.multimodal_conversation import (
    ANSWER_TOKENS,
    FIRST,
    SECOND,
    continued,
    our_logits,
    picture,
    recording,
    text,
    transformers_answer,
    transformers_model,
    write_checkpoint,
)

FILE = json.loads((Path(__file__).parent / "golden" / "multimodal.json").read_text())
GOLDEN: dict[str, list[int]] = {name: answer["tokens"] for name, answer in FILE.items()}
LOGITS = {name: np.array(answer["logits"]) for name, answer in FILE.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("multimodal") / "ckpt")


@pytest.fixture(scope="module", params=["onnx", "tflite"])
def bundle(checkpoint: Path, request: pytest.FixtureRequest) -> Path:
    options = {"recipe": "fp32", "context": 1024, "chunk": 64, "verify": False, "format": request.param}
    return export_bundle(checkpoint, checkpoint.with_name(request.param), **options).path


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return Model.load(bundle, threads=1)


@pytest.fixture(scope="module", autouse=True)
def pillow() -> None:
    pytest.importorskip("PIL")


def answer(model: Model, prompt: Prompt, progress: GenerationProgress | None = None) -> list[int]:
    return list(model.stream_tokens(prompt, max_tokens=ANSWER_TOKENS, progress=progress))


def test_the_conversation_is_what_it_should_be(model: Model) -> None:
    prompt = model.prompt(SECOND)
    assert [item.attachment.kind for item in prompt.placed] == ["audio", "image", "image"]
    assert prompt.soft_tokens == 16 + 188 + 16
    assert all(len(set(tokens)) > 8 for tokens in GOLDEN.values())
    assert GOLDEN["first"] != GOLDEN["second"]


@pytest.mark.parametrize("chunk", [64, 37])
def test_greedy_tokens_are_those_of_transformers(model: Model, chunk: int) -> None:
    model.decoder.chunk = chunk
    for name, messages in (("first", FIRST), ("second", SECOND)):
        model.reset()
        with recorded(model) as logits:
            assert answer(model, model.prompt(messages)) == GOLDEN[name], name
        assert_decided(np.stack(logits[-ANSWER_TOKENS:]), FP32)


def test_a_second_turn_continues_the_cache_and_agrees_still(model: Model) -> None:
    model.decoder.chunk = 64
    model.reset()
    first, progress = model.prompt(FIRST), GenerationProgress()
    assert answer(model, first) == GOLDEN["first"]
    prompt = continued(first, GOLDEN["first"], model.prompt(SECOND))
    with recorded(model) as logits:
        assert answer(model, prompt, progress) == GOLDEN["continued"]
    assert_decided(np.stack(logits[-ANSWER_TOKENS:]), FP32)
    assert progress.cached_tokens == len(first.ids) + ANSWER_TOKENS - 1


def test_another_picture_in_the_same_place_is_another_prompt(model: Model) -> None:
    def asked(seed: int) -> Prompt:
        return model.prompt(
            [{"role": "user", "content": [{"type": "image", "image": picture(seed)}, text("x")]}]
        )

    assert asked(3).ids == asked(4).ids
    logits = [our_logits(model, asked(seed)) for seed in (3, 4)]
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    # Without emptying the cache: what it holds is not taken for the other picture.
    model.reset()
    progress = GenerationProgress()
    list(model.stream_tokens(asked(3), max_tokens=2))
    longer = Prompt([*asked(4).ids, 300, 301], asked(4).placed)
    tokens = answer(model, longer, progress)
    model.reset()
    assert progress.cached_tokens == 0 and tokens == answer(model, longer)


def test_a_deferred_decoder_gives_the_same(bundle: Path) -> None:
    log: list[str] = []
    model = Model.load(bundle, threads=1, defer_decoder=True, log=log.append)
    assert isinstance(model.decoder, DeferredDecoder)
    assert answer(model, model.prompt(FIRST)) == GOLDEN["first"]
    assert [line.split()[0] for line in log] == ["image", "audio"]


def test_the_decoder_makes_room_where_there_is_not_enough_memory_for_both(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.load(bundle, threads=1, snapshots=0)
    assert isinstance(model.decoder, DeferredDecoder) and model.decoder.loaded
    assert answer(model, model.prompt(FIRST)) == GOLDEN["first"]
    follow_up = continued(model.prompt(FIRST), GOLDEN["first"], model.prompt(SECOND))
    for room, cached in (
        (1 << 20, 0),
        (1 << 40, len(model.prompt(FIRST).ids) + ANSWER_TOKENS - 1),
        (None, 0),
    ):
        monkeypatch.setattr(residency, "available_memory", lambda room=room: room)
        model.encoders._rows.clear()  # type: ignore[union-attr, attr-defined]
        if cached:
            model.reset()
            answer(model, model.prompt(FIRST))
        progress = GenerationProgress()
        assert answer(model, follow_up, progress) == GOLDEN["continued"]
        assert progress.cached_tokens == cached


def test_a_prefix_on_disk_spares_the_encoder(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The picture and the clip of an earlier process are known by their content."""
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path))
    logs: list[list[str]] = [[], []]
    for log in logs:
        model = Model.load(bundle, threads=1, prefix_cache="1GiB", log=log.append)
        progress = GenerationProgress()
        assert answer(model, model.prompt(FIRST), progress) == GOLDEN["first"]
    assert [line.split()[0] for line in logs[0]] == ["image", "audio"] and logs[1] == []
    assert progress.restored_from == "disk" and progress.cached_tokens > 200


def test_snapshots_go_before_the_decoder_does(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(bundle, threads=1)
    answer(model, model.prompt(FIRST))
    answer(model, model.prompt([{"role": "user", "content": "x" * 40}]))
    assert len(model.prompts.pool)
    room = iter([0, 1 << 40])
    monkeypatch.setattr(residency, "available_memory", lambda: next(room))
    model.encoders._rows.clear()  # type: ignore[union-attr, attr-defined]
    model.encode([item.attachment for item in model.prompt(SECOND).placed])
    assert not len(model.prompts.pool) and isinstance(model.decoder, DeferredDecoder) and model.decoder.loaded


def test_a_context_that_cannot_be_is_refused_before_anything_is_encoded(bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"context must be 1 to (4096|1024), not 5000"):
        Model.load(bundle, defer_decoder=True, context=5000)


def test_kept_encoders_give_the_same(bundle: Path) -> None:
    model = Model.load(bundle, threads=1, keep_encoders=True)
    for _ in range(2):
        model.reset()
        assert answer(model, model.prompt(FIRST)) == GOLDEN["first"]


@pytest.mark.parametrize("name", ["first", "second"])
def test_logits_are_those_of_transformers_and_hang_on_every_attachment(model: Model, name: str) -> None:
    messages = {"first": FIRST, "second": SECOND}[name]
    model.decoder.chunk = 64
    prompt = model.prompt(messages)
    assert np.abs(our_logits(model, prompt) - LOGITS[name]).max() <= 1e-3
    others = {"image": picture(9), "audio": np.flip(recording(13.0)).copy()}
    for place in prompt.placed:
        kind = place.attachment.kind
        (other,) = (p.attachment for p in model.prompt([_alone(kind, others[kind])]).placed)
        changed = [replace(p, attachment=other) if p is place else p for p in prompt.placed]
        difference = our_logits(model, Prompt(prompt.ids, tuple(changed))) - LOGITS[name]
        assert np.abs(difference).max() > 0.02, place.attachment.name


def _alone(kind: str, value: object) -> dict[str, object]:
    return {"role": "user", "content": [{"type": kind, kind: value}]}


def test_the_command_sees_and_hears(bundle: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user types it."""
    from PIL import Image

    Image.fromarray(picture(0)).save(tmp_path / "photo.png")
    write_wav(tmp_path / "note.wav", recording(3.0))
    argv = ["run", bundle, "-a", "photo.png", "What is it?", "-a", "note.wav", "--temperature", "0"]
    done = command(tmp_path, *argv, "--max-tokens", "4", "--json")
    usage = json.loads(done.stdout)["usage"]
    assert usage["soft_tokens"] == 16 + 188 and usage["encode_s"] > 0
    assert [line.split(",")[0] for line in done.stderr.splitlines()] == [
        "image photo.png: 16 tokens",
        "audio note.wav: 188 tokens",
    ]
    spoken = command(tmp_path, "transcribe", bundle, "note.wav", "--max-tokens", "4", "--json")
    assert json.loads(spoken.stdout)["segments"][0]["end"] == 3.0
    (tmp_path / "note.wav").write_bytes((tmp_path / "note.wav").read_bytes()[:5000])
    refused = command(tmp_path, *argv, code=3)
    assert refused.stdout == "" and "note.wav: data chunk: expected" in refused.stderr


def command(folder: Path, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "gemma_edge.cli.main", *arguments],
        cwd=folder,
        input="",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def test_live_transformers_agrees_with_the_golden_tokens(model: Model, checkpoint: Path) -> None:
    for package in ("torch", "transformers", "timm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    theirs = transformers_model(checkpoint)
    tokens, logits = transformers_answer(theirs, model, model.prompt(SECOND))
    assert tokens == GOLDEN["second"] and np.abs(LOGITS["second"] - logits).max() <= 1e-4
