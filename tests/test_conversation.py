"""Conversations: turns, a context that ends, several over one model, and files that bring them back."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.cli.main import main
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.conversations.conversation import Conversation
from gemma_edge.runtime.conversations.turns import Forgotten, Full, Turn, drop_oldest
from gemma_edge.runtime.errors import SessionError, UsageError
from gemma_edge.runtime.files.sealed_arrays import SEAL, read_sealed, write_sealed
from gemma_edge.runtime.media.attachments import Attachment
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from support.rule_decoder import answers, hash_rule, tiny_model

QUESTIONS = ["the first thing", "another", "and one more of it", "the last"]


@pytest.fixture
def model(tokenizer: Tokenizer) -> Model:
    return tiny_model(tokenizer, answers("one", "two", "three", tokenizer=tokenizer))


def rambling(tokenizer: Tokenizer, context: int = 400) -> Model:
    """Answers of ten tokens that depend on all that was said."""
    return tiny_model(tokenizer, hash_rule, context=context)


OPTIONS = {"max_tokens": 10}


# Turns. -------------------------------------------------------------------------------------------


def test_turns_go_on_from_each_other(model: Model) -> None:
    conversation = Conversation(model, system="Be brief.")
    assert [conversation.answer(text).text for text in QUESTIONS[:3]] == ["one", "two", "three"]
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 3
    assert conversation.tokens["cached"] > 0 and conversation.tokens["completion"] > 3
    conversation.reset()
    assert conversation.answer("again").text == "one"


def test_an_answer_that_is_not_noted_changes_nothing(model: Model) -> None:
    conversation = Conversation(model)
    conversation.answer("x")
    before = conversation.messages
    conversation.ask("y").cancel()
    conversation.note("")
    assert conversation.messages == before


def test_an_error_changes_nothing(model: Model) -> None:
    conversation = Conversation(model)
    conversation.answer("x")
    before = conversation.messages
    with pytest.raises(UsageError, match="context of 512"):
        conversation.ask("e" * 2000)
    assert conversation.messages == before and conversation.answer("y").text == "two"


def test_conversations_over_one_model_do_not_compute_each_others_beginnings(tokenizer: Tokenizer) -> None:
    model = rambling(tokenizer)
    two = [Conversation(model, system=text, options=OPTIONS) for text in ("of one", "of the other kind")]
    alone = [
        Conversation(rambling(tokenizer), system=text, options=OPTIONS)
        for text in ("of one", "of the other kind")
    ]
    for question in QUESTIONS:
        for here, there in zip(two, alone, strict=True):
            asked, expected = here.answer(question), there.answer(question)
            assert asked.text == expected.text
            assert asked.usage.cached_tokens == expected.usage.cached_tokens


# A context that ends. -----------------------------------------------------------------------------


def test_by_default_a_full_context_is_an_error_and_nothing_is_lost(tokenizer: Tokenizer) -> None:
    conversation = Conversation(rambling(tokenizer, 128), options=OPTIONS)
    conversation.answer(QUESTIONS[0])
    conversation.answer(QUESTIONS[1])
    before = conversation.messages
    with pytest.raises(UsageError, match="context of 128"):
        conversation.answer("e" * 90)
    assert conversation.messages == before


def test_the_oldest_turns_are_dropped_whole_and_that_is_said(tokenizer: Tokenizer) -> None:
    said: list[Forgotten] = []
    model = rambling(tokenizer, 160)
    conversation = Conversation(
        model, system="Be kind.", overflow="drop-oldest", options=OPTIONS, report=said.append
    )
    asked = [f"question {i}" for i in range(12)]
    for number, question in enumerate(asked):
        answer = conversation.ask(question, pinned=number == 1)
        prompt = answer.prompt
        for _ in answer:
            pass
        conversation.note(answer.completion)
        assert prompt is not None and "Be kind." in prompt.text and question in prompt.text
        assert len(prompt.ids) + 10 <= 160
        assert "question 1" in prompt.text or number == 0
    lost = [turn.messages[0]["content"] for forgotten in said for turn in forgotten.turns]
    kept = [turn.messages[0]["content"] for turn in conversation.turns]
    assert lost and lost == sorted(lost, key=asked.index)
    assert sorted([*lost, *kept], key=asked.index) == asked and kept[0] == "question 1"
    assert "context of 160" in str(said[0]) and "forgotten" in str(said[0]) and said[0].tokens > 0


def test_one_overflow_makes_room_for_several_turns(tokenizer: Tokenizer) -> None:
    """What stays is computed anew each time: that must not happen with every turn."""
    said: list[Forgotten] = []
    conversation = Conversation(
        rambling(tokenizer, 400), overflow="drop-oldest", options=OPTIONS, report=said.append
    )
    for number in range(30):
        conversation.answer(f"question {number}")
    assert 2 <= len(said) <= 8


def test_a_question_that_fills_the_context_alone_is_refused(tokenizer: Tokenizer) -> None:
    conversation = Conversation(rambling(tokenizer, 128), overflow="drop-oldest", options=OPTIONS)
    conversation.answer("x")
    before = conversation.messages
    with pytest.raises(UsageError, match="context of 128"):
        conversation.ask("e" * 300)
    assert conversation.messages == before


def test_thousands_of_turns_are_dropped_with_few_prompts() -> None:
    """A prompt for each turn that is dropped took minutes."""
    turns = [Turn([{"role": "user", "content": str(i)}], pinned=i == 7) for i in range(5000)]
    looks = []

    def tokens(kept: Sequence[Turn]) -> int:
        looks.append(len(kept))
        return 10 * len(kept)

    kept = drop_oldest(Full(turns, tokens, context=400, most=390))
    assert kept == [turns[7], *turns[-28:]] and len(looks) < 20
    kept = drop_oldest(Full(turns[:1], tokens, context=400, most=5))
    assert kept == turns[:1]


def test_a_function_decides_what_stays(tokenizer: Tokenizer) -> None:
    def summarize(full: Full) -> Sequence[Turn]:
        assert full.tokens(full.turns) > full.most and full.context == 128
        told = [{"role": "user", "content": "so far"}, {"role": "assistant", "content": "e"}]
        return [Turn(told), full.turns[-1]]

    conversation = Conversation(rambling(tokenizer, 128), overflow=summarize, options=OPTIONS)
    for question in QUESTIONS * 2:
        conversation.answer(question)
    assert conversation.messages[0]["content"] == "so far"


@pytest.mark.parametrize(
    "answer",
    [lambda full: [], lambda full: full.turns[:-1], lambda full: ["text"]],
    ids=["no", "without", "text"],
)
def test_a_function_that_loses_the_question_is_refused(answer: Any, tokenizer: Tokenizer) -> None:
    conversation = Conversation(rambling(tokenizer, 128), overflow=answer, options=OPTIONS)
    conversation.answer(QUESTIONS[0])
    with pytest.raises(UsageError, match="last of them must be the question"):
        conversation.answer("e" * 90)


def test_an_unknown_overflow_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match='"error", "drop-oldest" or a function'):
        Conversation(model, overflow="newest")  # type: ignore[arg-type]


# Files. -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    conversation = Conversation(rambling(tokenizer), system="Be kind.", options=OPTIONS)
    conversation.answer("the thing", pinned=True)
    conversation.answer("another")
    conversation.save(tmp_path / "a.session")
    return tmp_path / "a.session"


def test_a_saved_conversation_goes_on_as_if_nothing_had_happened(tokenizer: Tokenizer, saved: Path) -> None:
    whole = Conversation(rambling(tokenizer), system="Be kind.", options=OPTIONS)
    for text in ("the thing", "another"):
        whole.answer(text)
    again = Conversation.load(rambling(tokenizer), saved, options=OPTIONS)
    assert again.messages == whole.messages and again.tokens == whole.tokens
    assert [turn.pinned for turn in again.turns] == [True, False] and again.system == "Be kind."
    for text in ("and", "so on"):
        mine, theirs = again.answer(text), whole.answer(text)
        assert mine.text == theirs.text and mine.usage.cached_tokens == theirs.usage.cached_tokens > 0
    assert saved.stat().st_mode & 0o777 == 0o600 and not list(saved.parent.glob(".a.session*"))


def test_a_conversation_is_saved_while_another_one_has_the_cache(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = rambling(tokenizer)
    conversation, other = (Conversation(model, system=text, options=OPTIONS) for text in ("a", "b"))
    conversation.answer("the thing")
    other.answer("something else")
    conversation.save(tmp_path / "x")
    again = Conversation.load(rambling(tokenizer), tmp_path / "x", options=OPTIONS)
    assert again.answer("on").usage.cached_tokens == conversation.answer("on").usage.cached_tokens > 0


def test_saving_over_a_file_replaces_it_whole(tokenizer: Tokenizer, saved: Path) -> None:
    again = Conversation.load(rambling(tokenizer), saved, options=OPTIONS)
    again.answer("more")
    again.save(saved)
    assert len(Conversation.load(rambling(tokenizer), saved).turns) == 3
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        again.save(saved / "x")
    assert len(again.turns) == 3


def test_what_json_does_not_have_is_refused_and_the_old_file_stays(tokenizer: Tokenizer, saved: Path) -> None:
    conversation = Conversation.load(rambling(tokenizer), saved)
    conversation.turns[0].messages[0]["content"] = object()
    before = saved.read_bytes()
    with pytest.raises(UsageError, match="cannot be written"):
        conversation.save(saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_a_smaller_context_computes_again(tokenizer: Tokenizer, saved: Path) -> None:
    conversation = Conversation.load(rambling(tokenizer, 90), saved, overflow="drop-oldest", options=OPTIONS)
    conversation.answer("on")
    assert conversation.turns[0].pinned and len(conversation.turns) == 2


def test_another_version_of_the_engine_computes_again(tokenizer: Tokenizer, saved: Path) -> None:
    change(saved, lambda header, arrays: header["kv"].update(layout="of last year"))
    conversation = Conversation.load(rambling(tokenizer), saved, options=OPTIONS)
    assert len(conversation.turns) == 2 and conversation.answer("on").usage.cached_tokens == 0


def change(path: Path, how: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Changes a file and seals it again, as somebody would who knows how."""
    header, arrays = read_sealed(path)
    arrays = dict(arrays)
    how(header, arrays)
    path.unlink()
    write_sealed(path, header, arrays)


RESEALED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "another bundle": (lambda h, a: h.update(bundle="ab" * 32), "bundle: expected"),
    "a prefix": (lambda h, a: h.update(kind="prefix"), "kind"),
    "of the future": (lambda h, a: h.update(schema=2), "schema.*Upgrade"),
    "no turns": (lambda h, a: h.pop("turns"), "turns"),
    "a turn is a text": (lambda h, a: h.update(turns=["x"]), r"turns\[0\]"),
    "no role": (lambda h, a: h["turns"][0]["messages"][0].pop("role"), "role"),
    "content is a number": (lambda h, a: h["turns"][0]["messages"][0].update(content=7), "turns"),
    "system is a list": (lambda h, a: h.update(system=[]), "system"),
    "an attachment that is not there": (
        lambda h, a: h["turns"][0]["messages"][0].update(content=[{"type": "image", "attachment": 3}]),
        "turns",
    ),
    "a picture without data": (
        lambda h, a: h.update(attachments=[{"kind": "image", "name": "x"}]),
        "attachments",
    ),
    "keys are texts": (lambda h, a: h["kv"].update(keys=["x"]), "kv.keys"),
    "a key too many": (lambda h, a: h["kv"]["keys"].append(7), "kv"),
    "no buffers": (lambda h, a: h["kv"].update(buffers=[]), "kv"),
    "a buffer of another shape": (lambda h, a: a.update(ids=np.zeros((2, 2), np.int32)), "kv"),
}


@pytest.mark.parametrize(("how", "said"), RESEALED.values(), ids=RESEALED.keys())
def test_what_does_not_belong_is_refused(how: Any, said: str, saved: Path, tokenizer: Tokenizer) -> None:
    change(saved, how)
    with pytest.raises(SessionError, match=said) as caught:
        Conversation.load(rambling(tokenizer), saved)
    assert caught.value.exit_code == 3 and str(caught.value).isprintable()


def test_counts_that_nobody_knows_are_left_out(saved: Path, tokenizer: Tokenizer) -> None:
    change(saved, lambda h, a: h["tokens"].update(more="NaN"))
    assert Conversation.load(rambling(tokenizer), saved).tokens.keys() == {"prompt", "cached", "completion"}


def test_every_flipped_byte_is_refused(saved: Path, tokenizer: Tokenizer) -> None:
    raw, model = saved.read_bytes(), rambling(tokenizer)
    for at in [*range(0, len(raw) - SEAL, 37), *range(len(raw) - SEAL - 2, len(raw))]:
        saved.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        with pytest.raises(SessionError):
            Conversation.load(model, saved)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 100, -1, -33])
def test_a_truncated_file_is_refused(size: int, saved: Path, tokenizer: Tokenizer) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(SessionError):
        Conversation.load(rambling(tokenizer), saved)


@pytest.mark.parametrize("kind", ["folder", "missing", "text"])
def test_what_is_no_session_is_refused(kind: str, tmp_path: Path, model: Model) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("a long text " * 100)
    with pytest.raises(SessionError):
        Conversation.load(model, path)


# Real engines. ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["onnx", "tflite", "litertlm"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pocket, whose windows of 64 tokens a conversation leaves behind."""
    if request.param != "onnx":
        pytest.importorskip("ai_edge_litert")
    out = tmp_path_factory.mktemp(request.param) / ("out" + ARTIFACT_FORMATS[request.param].suffix)
    checkpoint = Path(__file__).parents[1] / "pocket" / "checkpoint"
    options: dict[str, Any] = {"recipe": "int4", "context": 512, "verify": False, "calibrate": "none"}
    return export_bundle(checkpoint, out, format=request.param, **options).path


@pytest.mark.slow
def test_in_every_format_a_restored_conversation_equals_the_uninterrupted_one(
    bundle: Path, tmp_path: Path
) -> None:
    options = {"temperature": 0, "max_tokens": 24}
    picture = Path(__file__).parents[1] / "pocket/checkpoint/samples/image-what-0.png"
    whole = Conversation(Model.load(bundle, threads=1), system="Be brief.", options=options)
    whole.attach(picture)
    for place in ("bottom left", "top right", "bottom right", "bottom left"):
        whole.answer(f"What is in the {place}?")
    whole.save(tmp_path / "x")
    again = Conversation.load(Model.load(bundle, threads=1), tmp_path / "x", options=options)
    assert any(isinstance(p.get("image"), Attachment) for p in again.messages[0]["content"])
    assert again.model.decoder.position == whole.model.decoder.position > 100
    for text in ("Where is the green cross?", "Why is the sky blue?"):
        mine, theirs = again.answer(text), whole.answer(text)
        assert mine.text == theirs.text
        assert mine.usage.cached_tokens == theirs.usage.cached_tokens > 100
        held, expected = (c.model.decoder.snapshot().arrays for c in (again, whole))
        assert all(held[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.slow
def test_in_every_format_a_prefix_on_disk_serves_the_next_process(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first process computes the prefix and goes on, the second reads it and goes on: bit for bit."""
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    document = "Air scatters blue light more than red light. " * 12
    results = []
    for _ in range(2):
        model = Model.load(bundle, threads=1, snapshots=0, prefix_cache="1GiB")
        done = model.generate("Why is the sky blue?", system=document, temperature=0, max_tokens=24)
        results.append((done.text, model.decoder.snapshot(), done.usage))
    (first, state, cold), (second, restored, warm) = results
    assert (cold.cached_tokens, warm.restored_from) == (0, "disk") and warm.cached_tokens >= 128
    assert first == second
    assert all(state.arrays[n].tobytes() == restored.arrays[n].tobytes() for n in state.arrays)


@pytest.mark.slow
def test_the_command_line_keeps_prefixes(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    document = "Air scatters blue light more than red light. " * 12
    run = ["run", str(bundle), "-s", document, "--threads", "1", "--max-tokens", "4", "-u"]
    said = []
    for question in ("Why is the sky blue?", "And red?"):
        assert main([*run, question, "--prefix-cache", "1GiB"]) == 0
        said.append(capsys.readouterr().err)
    assert "(0 cached)" in said[0] and "cached, on disk)" in said[1]
    assert main(["cache", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["files"]
    assert sum(file["name"].endswith(".prefix") for file in listed) == 1
    assert main([*run, "x", "--prefix-cache", "much"]) == 2


@pytest.mark.slow
def test_chat_goes_on_when_the_context_is_full(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Twelve turns in a context of 128, in two sessions; with `--overflow error` they end as they used to."""
    chat = ["chat", str(bundle), "--context", "128", "--threads", "1", "--max-tokens", "16", "--json"]
    session = str(tmp_path / "x.session")
    for turns in (8, 4):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Why is the sky blue?\n" * turns))
        assert main([*chat, "--session", session]) == 0
        out, err = capsys.readouterr()
        assert len([json.loads(line) for line in out.splitlines()]) == turns
        assert "the conversation reached the context of 128 tokens" in err
        assert "Traceback" not in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why is the sky blue?\n" * 8))
    assert main([*chat, "--overflow", "error"]) == 2
    Path(session).write_bytes(b"no session")
    assert main([*chat, "--session", session]) == 3
    assert Path(session).read_bytes() == b"no session"
