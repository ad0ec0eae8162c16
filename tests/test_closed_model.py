"""A model gives its memory back: `close`, `with`, and streams that are left early."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model import Model
from support.rule_decoder import answers, tiny_model
from support.tiny_tokenizer import tiny_tokenizer

CLOSED = r"the model is closed: load it again with Model\.load"
USES: dict[str, Callable[[Model], object]] = {
    "generate": lambda model: model.generate("hi"),
    "stream": lambda model: list(model.generate("hi", stream=True)),
    "stream_tokens": lambda model: list(model.stream_tokens([2, 3])),
    "reset": lambda model: model.reset(),
    "decoder": lambda model: model.decoder.position,
}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    tokenizer = tiny_tokenizer(tmp_path)
    return tiny_model(tokenizer, answers("the first", "the second", "the third", tokenizer=tokenizer))


@pytest.mark.parametrize("use", USES)
def test_a_closed_model_says_so(model: Model, use: str) -> None:
    model.close()
    model.close()
    with pytest.raises(UsageError, match=CLOSED):
        USES[use](model)


def test_leaving_a_with_block_closes(model: Model) -> None:
    with model as same:
        assert same is model and model.generate("hi").text
    with pytest.raises(UsageError, match=CLOSED):
        model.generate("hi")


def test_closing_ends_a_stream(model: Model) -> None:
    stream = model.generate("hi", stream=True)
    next(stream)
    model.close()
    assert stream.completion.finish_reason == "cancelled"
    assert list(stream) == []


def test_break_frees_the_model_at_once(model: Model) -> None:
    """Though a name still holds the stream, and nothing of it was cancelled."""
    stream = model.generate("hi", stream=True)
    for _ in stream:
        break
    assert stream.completion.finish_reason == "cancelled"
    assert model.generate("on").finish_reason == "stop"


def test_next_leaves_a_stream_to_go_on(model: Model) -> None:
    whole = model.generate("hi").text
    model.reset()
    stream = model.generate("hi", stream=True)
    assert next(stream) + "".join(stream) == stream.completion.text
    assert len(stream.completion.text) > 0 and whole


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "tflite"])
@pytest.mark.parametrize("defer", [False, True], ids=["", "deferred"])
def test_a_real_engine_gives_its_files_back(
    format: str, defer: bool, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))  # models of other tests use the usual one
    options = {"recipe": "int8", "context": 64, "chunk": 32, "verify": False, "format": format}
    path = export_bundle(tiny_checkpoint, tmp_path / "out", **options).path  # type: ignore[arg-type]

    def held() -> set[str]:
        """Files of the bundle, or made from it, that are open or mapped."""
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        names = {os.readlink(link) for link in links if os.path.islink(link)}
        names |= {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        return {name for name in names if str(tmp_path) in name}

    with Model.load(path, defer_decoder=defer) as model:
        for _ in model.generate("hi", stream=True, max_tokens=4):
            break
        assert held()
    assert held() == set()
    with pytest.raises(UsageError, match=CLOSED):
        model.generate("hi")
