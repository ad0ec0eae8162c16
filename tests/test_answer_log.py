"""The log of loads and answers: off by default, complete when on, and without what was said."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.cli import main as cli
from gemma_edge.runtime.answer_log import LOGGER, hashed
from gemma_edge.runtime.errors import GemmaEdgeError
from gemma_edge.runtime.host.own_memory import own_memory
from gemma_edge.runtime.model import Model
from support.rule_decoder import RuleDecoder, answers, tiny_model
from support.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Model:
    tokenizer = tiny_tokenizer(tmp_path)
    return tiny_model(tokenizer, answers("the answer is 42", tokenizer=tokenizer))


def fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    found = [record.fields for record in caplog.records if record.name == LOGGER]  # type: ignore[attr-defined]
    assert [record.message.partition(" ")[2] for record in caplog.records] == [json.dumps(f) for f in found]
    return found


def test_nothing_is_logged_by_default(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    model.generate("hi")
    assert caplog.records == []
    code = "import sys; import gemma_edge.runtime.model; print('logging' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_answer_is_logged_with_what_it_took(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    first = model.generate("the secret", client="the client")
    model.generate("the secret", max_tokens=2)
    one, two = fields(caplog)
    assert one["event"] == "answer" and one["finish_reason"] == "stop" and one["error"] is None
    assert one["prompt_tokens"] == first.usage.prompt_tokens
    assert one["completion_tokens"] == first.usage.completion_tokens
    assert one["prefill_s"] > 0 and one["decode_s"] > 0 and one["rss_bytes"] > one["rss_anon_bytes"] > 0
    assert one["prompt_hash"] == two["prompt_hash"] and len(one["prompt_hash"]) == 16
    assert one["client_hash"] == hashed("the client") and two["client_hash"] is None
    assert two["finish_reason"] == "length" and two["completion_tokens"] == 2
    assert not any(word in caplog.text for word in ("secret", "the client", "answer is"))


def test_every_end_is_logged_once(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    stream = model.generate("hi", stream=True)
    next(stream)
    stream.cancel()
    stream.cancel()
    model.generate("hi", guard=lambda stage, text: stage != "prompt")
    decoder = model.decoder
    assert isinstance(decoder, RuleDecoder)
    decoder.broken = True
    with pytest.raises(GemmaEdgeError):
        model.generate("ho")
    ends = [(record["finish_reason"], record["error"]) for record in fields(caplog)]
    assert ends == [("cancelled", None), ("filtered", None), ("error", "GemmaEdgeError")]


def test_hashes_differ_between_processes() -> None:
    code = "from gemma_edge.runtime.answer_log import hashed; print(hashed('hi'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() != hashed("hi") and len(done.stdout.strip()) == 16
    assert hashed("\ud800") != hashed("hi")


def test_the_command_logs_when_asked(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(Model, "load", lambda path, **options: model)
    monkeypatch.setenv(cli.LOG, "1")
    logger, root = logging.getLogger(LOGGER), logging.getLogger()
    level, handlers = logger.level, list(root.handlers)
    for handler in handlers:
        root.removeHandler(handler)
    try:
        assert cli.main(["run", "b", "hi"]) == 0
    finally:
        logger.setLevel(level)
        root.handlers[:] = handlers
    out, err = capsys.readouterr()
    assert out == "the answer is 42\n" and '"event": "answer"' in err


def test_memory_of_this_process() -> None:
    anonymous, resident = own_memory()
    assert anonymous and resident and 0 < anonymous < resident


@pytest.mark.slow
def test_a_load_is_logged(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    with Model.load(tiny_bundle) as model:
        model.generate("hi", max_tokens=2)
    load, answer = fields(caplog)
    assert load["event"] == "load" and load["bundle"] == str(tiny_bundle) and load["load_s"] > 0
    assert answer["completion_tokens"] == 2
