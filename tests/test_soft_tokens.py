"""Rows of attachments in the place of their soft tokens: fed, reused, and asked for only where needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_edge.runtime import residency
from gemma_edge.runtime.artifacts.modalities import Modality
from gemma_edge.runtime.artifacts.token_rows import TokenRows
from gemma_edge.runtime.engines.deferred_decoder import DeferredDecoder
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.generate import TokenGenerator
from gemma_edge.runtime.media import encoder_pool as encoders_module
from gemma_edge.runtime.media.attachments import Attachment, Reader
from gemma_edge.runtime.media.encoder_pool import Encoded, Encoders
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.prompt_builder import Placed, Prompt
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.residency import Residency
from gemma_edge.runtime.sampling import Sampler, Sampling
from gemma_edge.runtime.usage import GenerationProgress
from support.rule_decoder import IdTable, RowDecoder, hash_rule
from support.stub_modalities import IMAGE_TOKENS, modalities
from support.tiny_tokenizer import EOS, write_tokenizer

GREEDY = Sampler(Sampling(temperature=0.0))
SOFT = 9
Array = NDArray[np.float32]


def picture(shade: int) -> Attachment:
    return Attachment("image", f"{shade}.png", IMAGE_TOKENS, np.full((3, 2, 2), shade, np.uint8))


def rows_of(item: Attachment) -> Array:
    """One value a row, the width of IdTable's rows."""
    return 1000 + 10 * item.data.reshape(-1)[:1].astype(np.float32) + np.arange(4, dtype=np.float32)[:, None]


class StubEncoders:
    """Remember what they were asked for."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def needed_bytes(self, attachments: Sequence[Attachment]) -> int:
        return len(attachments)

    def encode(
        self, attachments: Sequence[Attachment], cancelled: Callable[[], bool] = lambda: False
    ) -> dict[int, Array] | None:
        self.calls.append([item.name for item in attachments])
        return None if cancelled() else {item.key: rows_of(item) for item in attachments}


def prompt(*parts: int | Attachment) -> Prompt:
    ids: list[int] = []
    placed: list[Placed] = []
    for part in parts:
        if isinstance(part, Attachment):
            placed.append(Placed(len(ids), len(ids) + IMAGE_TOKENS, part))
            ids += [SOFT] * IMAGE_TOKENS
        else:
            ids.append(part)
    return Prompt(ids, tuple(placed))


def generator(**options: Any) -> tuple[TokenGenerator, RowDecoder, StubEncoders]:
    decoder, encoders = RowDecoder(hash_rule, **options), StubEncoders()
    return TokenGenerator(Residency(decoder, encoders), IdTable(), IdTable()), decoder, encoders


def answer(engine: TokenGenerator, question: Prompt, count: int = 5, **options: Any) -> list[int]:
    return list(engine.stream_tokens(question, GREEDY, max_tokens=count, **options))


QUESTION = prompt(270, picture(1), 271, picture(2), picture(3), 272, 273)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 100])
def test_rows_stand_in_the_place_of_soft_tokens_in_any_chunking(chunk: int) -> None:
    engine, decoder, encode = generator(chunk=chunk)
    progress = GenerationProgress()
    answer(engine, QUESTION, 1, progress=progress)
    pictures = [[int(v) for v in rows_of(picture(shade))[:, 0]] for shade in (1, 2, 3)]
    assert decoder.ids == [270, *pictures[0], 271, *pictures[1], *pictures[2], 272, 273]
    assert encode.calls == [["1.png", "2.png", "3.png"]]
    usage = progress.usage()
    assert usage.soft_tokens == 3 * IMAGE_TOKENS and usage.encode_s is not None
    assert usage.time_to_first_token_s is not None and usage.time_to_first_token_s > usage.encode_s


def test_a_turn_that_continues_encodes_only_what_is_new() -> None:
    engine, decoder, encode = generator()
    first = answer(engine, QUESTION)
    longer = prompt(
        270, picture(1), 271, picture(2), picture(3), 272, 273, *first, 280, picture(2), picture(7), 281
    )
    progress = GenerationProgress()
    second = answer(engine, longer, progress=progress)
    assert progress.cached_tokens == len(QUESTION.ids) + len(first) - 1
    assert encode.calls[1:] == [["2.png", "7.png"]]
    assert second == answer(generator()[0], longer)
    assert decoder.ids[: len(longer.ids)] != longer.ids


@pytest.mark.parametrize("other", [prompt(270, picture(4), 271, 272), prompt(270, *[SOFT] * 4, 271, 272)])
def test_another_picture_in_the_same_place_is_another_prompt(other: Prompt) -> None:
    engine, _, encode = generator()
    asked = prompt(270, picture(1), 271)
    answer(engine, asked, 1)
    assert other.ids[: len(asked.ids)] == asked.ids
    progress = GenerationProgress()
    assert answer(engine, other, progress=progress) == answer(generator()[0], other)
    assert progress.cached_tokens == 0 and len(encode.calls) == 1 + len(other.placed)


def test_a_text_prompt_asks_no_encoder() -> None:
    engine, _, encode = generator()
    progress = GenerationProgress()
    answer(engine, prompt(270, 271), progress=progress)
    assert encode.calls == [] and progress.usage().encode_s is None


def test_cancelled_while_encoding() -> None:
    engine, decoder, encode = generator()
    assert answer(engine, QUESTION, cancelled=lambda: True) == []
    assert decoder.calls == [] and encode.calls == [["1.png", "2.png", "3.png"]]
    assert answer(engine, QUESTION) == answer(generator()[0], QUESTION)


def test_an_encoder_that_fails_leaves_a_model_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, encoders = generator()
    answer(engine, prompt(270), 1)

    def fail(*arguments: Any) -> None:
        raise UsageError("broken")

    monkeypatch.setattr(encoders, "encode", fail)
    with pytest.raises(UsageError, match="broken"):
        answer(engine, QUESTION)
    monkeypatch.undo()
    assert answer(engine, QUESTION) == answer(generator()[0], QUESTION)


def test_without_encoders_attachments_are_refused() -> None:
    engine = TokenGenerator(Residency(RowDecoder(hash_rule)), IdTable(), IdTable())
    with pytest.raises(UsageError, match="without encoders"):
        answer(engine, QUESTION)


def test_a_prompt_that_does_not_fit_says_what_takes_how_much() -> None:
    engine, _, encode = generator(context=12)
    with pytest.raises(UsageError, match=r"\(1.png takes 4 tokens, 2.png takes 4 tokens, 3.png takes 4"):
        engine.stream_tokens(QUESTION, GREEDY)
    assert encode.calls == []


# Residency. ---------------------------------------------------------------------------------------


def test_the_decoder_is_loaded_after_the_encoders_are_released() -> None:
    events: list[str] = []
    decoder = RowDecoder(hash_rule)

    def load() -> RowDecoder:
        events.append("decoder")
        return decoder

    deferred = DeferredDecoder(load, context=512, chunk=16)

    class Encoders(StubEncoders):
        def encode(self, *arguments: Any) -> dict[int, Array] | None:
            events.append("encode")
            return super().encode(*arguments)

    engine = TokenGenerator(Residency(deferred, Encoders()), IdTable(), IdTable())
    assert answer(engine, QUESTION) == answer(generator()[0], QUESTION)
    assert events == ["encode", "decoder"]
    assert deferred.position == decoder.position == len(QUESTION.ids) + 4
    answer(engine, prompt(270))
    assert events == ["encode", "decoder"]


def test_a_decoder_that_was_released_is_loaded_again_and_fed_all_of_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[RowDecoder] = []

    def load() -> RowDecoder:
        loads.append(RowDecoder(hash_rule))
        return loads[-1]

    monkeypatch.setattr(residency, "available_memory", lambda: residency.SPARE_BYTES)
    deferred, encode = DeferredDecoder(load, context=512, chunk=16), StubEncoders()
    engine = TokenGenerator(Residency(deferred, encode), IdTable(), IdTable())
    first = answer(engine, QUESTION)
    text = Prompt([*QUESTION.ids, *first, 280], QUESTION.placed)
    answer(engine, text)  # no new attachment: nothing is released
    assert len(loads) == 1 and len(encode.calls) == 1
    longer = Prompt(
        [*text.ids, *[SOFT] * 4, 281], (*text.placed, Placed(len(text.ids), len(text.ids) + 4, picture(8)))
    )
    engine.reset()
    answer(engine, text)
    progress = GenerationProgress()
    assert answer(engine, longer, progress=progress) == answer(generator()[0], longer)
    assert progress.cached_tokens == 0 and encode.calls[-1] == ["1.png", "2.png", "3.png", "8.png"]
    old = weakref.ref(loads.pop(0))
    loads.clear()
    deferred.release()
    assert old() is None and not deferred.loaded


class FakeEncoder:
    """In the place of a `MediaEncoder`."""

    loaded: ClassVar[list[str]]
    events: ClassVar[list[str]]
    soft_tokens, hidden_size = IMAGE_TOKENS, 4

    def __init__(self, modality: Modality) -> None:
        self.name = modality.kind
        self.events.append(f"load {self.name}")
        self.loaded.append(self.name)
        assert len(self.loaded) <= 1 or self.keeps

    keeps = False

    def encode(self, *arguments: Any) -> Array:
        self.events.append(self.name)
        return np.zeros((IMAGE_TOKENS, 4), np.float32)

    def close(self) -> None:
        self.events.append(f"close {self.name}")
        self.loaded.remove(self.name)


@pytest.fixture
def fake() -> type[Any]:
    class Fake(FakeEncoder):
        loaded, events = [], []

    return Fake


IDS = {name: index for index, name in enumerate(("boi", "boa", "eoi", "image", "eoa", "audio"), 4)}


def recording(seed: int) -> Attachment:
    samples = np.random.default_rng(seed).uniform(-1, 1, 2_000).astype(np.float32)
    return Attachment("audio", f"{seed}.wav", IMAGE_TOKENS, samples)


def test_each_encoder_is_loaded_once_and_alone(fake: type[Any]) -> None:
    done: list[Encoded] = []
    encoders = Encoders(modalities(IDS, IMAGE_TOKENS), fake, report=done.append)
    items = [recording(1), picture(1), recording(2), picture(2), picture(1)]
    found = encoders.encode(items)
    assert found is not None and set(found) == {item.key for item in items}
    vision, audio = (
        ["load vision", "vision", "vision", "close vision"],
        ["load audio", "audio", "audio", "close audio"],
    )
    assert fake.events == vision + audio and fake.loaded == []
    assert str(done[0]).startswith("image 1.png: 4 tokens, ") and len(done) == 4
    fake.events.clear()
    assert encoders.encode(items) is not None and fake.events == []  # their rows are kept
    encoders.encode([picture(3)])
    assert fake.events == ["load vision", "vision", "close vision"]


def test_encoders_may_be_kept(fake: type[Any]) -> None:
    fake.keeps = True
    encoders = Encoders(modalities(IDS, IMAGE_TOKENS), fake, keep=True)
    encoders.encode([picture(1), recording(1)])
    encoders.encode([picture(2)])
    assert fake.events == ["load vision", "vision", "load audio", "audio", "vision"]
    encoders.close()
    assert fake.loaded == []


def test_rows_are_kept_within_bounds(fake: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders_module, "KEPT_BYTES", 2 * IMAGE_TOKENS * 4 * 4)
    encoders = Encoders(modalities(IDS, IMAGE_TOKENS), fake)
    assert len(encoders.encode([picture(1), picture(2), picture(3)]) or ()) == 3
    fake.events.clear()
    encoders.encode([picture(2), picture(3)])
    assert fake.events == []
    encoders.encode([picture(1)])
    assert "vision" in fake.events


def test_cancelling_or_an_error_releases_the_encoder(fake: type[Any]) -> None:
    encoders = Encoders(modalities(IDS, IMAGE_TOKENS), fake)
    calls = iter([False, True])
    assert encoders.encode([picture(1), picture(2)], lambda: next(calls)) is None
    assert fake.loaded == []

    def fail(*arguments: Any) -> Array:
        raise MemoryError

    fake.encode = fail
    with pytest.raises(MemoryError):
        encoders.encode([picture(3)])
    assert fake.loaded == []


# Ids of modalities in the text. -------------------------------------------------------------------


class Rows:
    """Rows of a table: `first` for row 0, and one more for each next."""

    def __init__(self, first: float) -> None:
        self.first = first

    def lookup(self, ids: NDArray[np.int64]) -> Array:
        return (np.asarray(ids, np.float32) + np.float32(self.first)).reshape(-1, 1)


def test_ids_of_a_modality_have_rows_of_their_own() -> None:
    class Own:
        def __init__(self, first_id: int, value: float) -> None:
            self.ids, self.value = range(first_id, first_id + 3), value

        def token_table(self) -> Rows:
            return Rows(self.value)

    rows = TokenRows(Rows(0.0), [Own(20, 500.0), Own(23, 900.0)])  # type: ignore[arg-type, list-item]
    got = rows.lookup(np.array([1, 19, 20, 22, 23, 25, 26]))[:, 0]
    assert got.tolist() == [1, 19, 500, 502, 900, 902, 26]


# The same through `Model`. ------------------------------------------------------------------------


def test_a_model_answers_about_a_picture(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.model")
    first = Tokenizer(path).n_pieces
    names = ("start_of_image", "start_of_audio", "end_of_image", "image_soft_token", "end_of_audio")
    added = {f"<{name}>": first + i for i, name in enumerate((*names, "audio_soft_token"))}
    tokenizer = Tokenizer(path, added)
    ids = {name: first + i for i, name in enumerate(("boi", "boa", "eoi", "image", "eoa", "audio"))}
    every, encode = modalities(ids), StubEncoders()
    decoder = RowDecoder(hash_rule, vocab_size=first + 6)
    model = Model(
        decoder,
        IdTable(),
        IdTable(),
        tokenizer,
        sampling=Sampling(temperature=0.0),
        end_ids=[EOS],
        reader=Reader(every, context=512),
        encoders=encode,
    )
    turn = {
        "role": "user",
        "content": [{"type": "image", "image": picture(5)}, {"type": "text", "text": "hi"}],
    }
    answer = model.generate([turn], max_tokens=4)
    assert answer.usage.soft_tokens == IMAGE_TOKENS and encode.calls == [["5.png"]]
    assert [i for i in decoder.ids if i >= 1000] == [1050, 1051, 1052, 1053]
    assert answer.to_dict()["usage"]["encode_s"] is not None
    # The very same prompt: its KV is of no use, since a token must be left to feed; its rows are.
    assert model.generate([turn], max_tokens=4).text == answer.text
