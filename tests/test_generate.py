"""Prefill, prefix reuse, stop strings, streams and cancellation, on a decoder that follows a rule."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime.answers import StopStrings
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from gemma_edge.runtime.generate import TokenGenerator
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.residency import Residency
from gemma_edge.runtime.sampling import Sampler, Sampling
from gemma_edge.runtime.usage import GenerationProgress
from support.rule_decoder import IdTable, Rule, RuleDecoder, answers, hash_rule, tiny_model
from support.tiny_tokenizer import BOS, END_OF_TURN, EOS

GREEDY = Sampler(Sampling(temperature=0.0))
PROMPT = [BOS, *range(270, 300)]


@pytest.fixture
def model(tokenizer: Tokenizer) -> Model:
    return tiny_model(tokenizer, answers("the answer is 42", "and the next", tokenizer=tokenizer))


def generator(rule: Rule = hash_rule, **options: int) -> tuple[TokenGenerator, RuleDecoder]:
    decoder = RuleDecoder(rule, **options)
    return TokenGenerator(Residency(decoder), IdTable(), IdTable()), decoder


def tokens(engine: TokenGenerator, prompt: list[int], **options: object) -> list[int]:
    return list(engine.stream_tokens(prompt, GREEDY, **{"max_tokens": 12, **options}))  # type: ignore[arg-type]


# Prefill and decode. ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 7, 30, 31, 32, 512])
def test_any_chunking_gives_the_same_tokens(chunk: int) -> None:
    engine, decoder = generator(chunk=chunk)
    assert tokens(engine, PROMPT) == tokens(generator(chunk=64)[0], PROMPT)
    prefill = decoder.calls[:-11]
    assert sum(prefill) == len(PROMPT) and max(prefill) <= chunk


def test_an_end_id_ends_and_is_the_last() -> None:
    script = [280, 281, END_OF_TURN, 282]
    engine, decoder = generator(lambda ids: script[max(0, len(ids) - len(PROMPT))])
    assert tokens(engine, PROMPT, end_ids=[EOS, END_OF_TURN]) == [280, 281, END_OF_TURN]
    assert decoder.position == len(PROMPT) + 2  # the end token itself is not fed


def test_filling_the_context_ends_the_answer() -> None:
    engine, decoder = generator(context=40)
    assert len(tokens(engine, PROMPT, max_tokens=None)) == 40 - len(PROMPT)
    assert len(tokens(engine, PROMPT, max_tokens=10**6)) == 40 - len(PROMPT)
    assert decoder.position <= 40


@pytest.mark.parametrize("room", [0, -1, -100])
def test_a_prompt_that_leaves_no_room_is_refused(room: int) -> None:
    engine, decoder = generator(context=200)
    with pytest.raises(
        UsageError, match=f"prompt has {200 - room} tokens.*context of 200.*it is {1 - room} too long"
    ):
        engine.stream_tokens([BOS] * (200 - room), GREEDY)
    assert decoder.calls == []


def test_the_longest_prompt_that_fits_gives_one_token() -> None:
    assert len(tokens(generator(context=200)[0], [BOS] * 199, max_tokens=None)) == 1


@pytest.mark.parametrize(
    ("prompt", "options"), [([], {}), ([BOS], {"max_tokens": 0}), ([BOS], {"max_tokens": -3})]
)
def test_nothing_to_do_is_refused(prompt: list[int], options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        generator()[0].stream_tokens(prompt, GREEDY, **options)  # type: ignore[arg-type]


def test_nan_logits_are_an_error_and_the_cache_is_not_trusted_after_it() -> None:
    engine, decoder = generator()
    decoder.broken = True
    with pytest.raises(GemmaEdgeError, match="nan"):
        tokens(engine, PROMPT)
    decoder.broken = False
    assert tokens(engine, PROMPT) == tokens(generator()[0], PROMPT)


# Prefix reuse. ------------------------------------------------------------------------------------


def test_a_prompt_that_continues_the_cache_feeds_only_the_rest() -> None:
    engine, decoder = generator()
    first = tokens(engine, PROMPT)
    longer = [*PROMPT, *first, 290, 291]
    decoder.calls.clear()
    progress = GenerationProgress()
    second = tokens(engine, longer, progress=progress)
    assert decoder.calls[0] == 3  # the last token of the answer, which was not fed, and two new ones
    assert progress.usage().cached_tokens == len(PROMPT) + len(first) - 1
    assert second == tokens(generator()[0], longer)


@pytest.mark.parametrize("change", [0, 15, 30])
def test_a_prompt_that_differs_anywhere_starts_anew(change: int) -> None:
    engine, decoder = generator()
    tokens(engine, PROMPT, max_tokens=1)
    other = [*PROMPT, 290]
    other[change] = 264
    decoder.calls.clear()
    assert tokens(engine, other) == tokens(generator()[0], other)
    assert sum(decoder.calls) == len(other) + 11


def test_the_very_same_prompt_is_answered_again() -> None:
    engine, _ = generator()
    assert tokens(engine, PROMPT, max_tokens=1) == tokens(engine, PROMPT, max_tokens=1)


def test_a_cache_that_somebody_else_moved_is_not_reused() -> None:
    engine, decoder = generator()
    tokens(engine, PROMPT, max_tokens=1)
    decoder.reset()
    longer = [*PROMPT, 290]
    assert tokens(engine, longer) == tokens(generator()[0], longer)


def test_after_an_error_in_the_decoder_the_cache_is_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, decoder = generator()
    tokens(engine, PROMPT, max_tokens=1)
    forward = decoder.forward

    def interrupted(*args: object, **options: object) -> None:
        forward(*args, **options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    longer = [*PROMPT, 290]
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens(engine, longer)
    assert tokens(engine, longer) == tokens(generator()[0], longer)


@given(
    prompts=st.lists(st.lists(st.integers(270, 273), min_size=1, max_size=12), max_size=6),
    chunk=st.integers(1, 9),
)
def test_reuse_never_changes_an_answer(prompts: list[list[int]], chunk: int) -> None:
    engine, _ = generator(chunk=chunk)
    for prompt in prompts:
        assert tokens(engine, prompt, max_tokens=3) == tokens(generator()[0], prompt, max_tokens=3)


def test_a_conversation_reuses_its_turns(model: Model) -> None:
    first = model.generate("hi")
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "on"},
    ]
    second = model.generate(turns)
    assert (first.text, second.text) == ("the answer is 42", "and the next")
    assert second.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens - 1


# Stop strings. ------------------------------------------------------------------------------------


def filtered(text: str, stops: list[str], cuts: list[int]) -> tuple[str, bool]:
    stop = StopStrings(stops)
    edges = sorted({0, *(c % (len(text) + 1) for c in cuts), len(text)})
    out = "".join(stop.push(text[a:b]) for a, b in pairwise(edges))
    return out + stop.flush(), stop.found


@given(
    text=st.text(alphabet="ab", max_size=20),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    out, found = filtered(text, stops, cuts)
    assert (out, found) == filtered(text, stops, list(range(len(text))))
    assert found == any(stop in text for stop in stops)
    assert text.startswith(out) and not any(stop in out for stop in stops)
    if not found:
        assert out == text


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stop = StopStrings(["<end>"])
    assert [stop.push(c) for c in "a<en"] == ["a", "", "", ""]
    assert stop.push("x") == "<enx"
    assert stop.push("<end>more") == "" and stop.found
    assert stop.push("more") == "" and stop.flush() == ""


@pytest.mark.parametrize("stop", ["is", " 42", ["zzz", "ans"], "the answer is 42"])
def test_a_stop_string_over_several_tokens(model: Model, stop: str | list[str]) -> None:
    first = stop if isinstance(stop, str) else stop[-1]
    stream = model.generate("hi", stream=True, stop=stop)
    text = "".join(stream)
    assert text == "the answer is 42".split(first)[0] == stream.completion.text
    assert stream.completion.finish_reason == "stop"


def test_a_stop_string_that_only_begins_is_text(model: Model) -> None:
    assert model.generate("hi", stop="42!").text == "the answer is 42"


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_string_is_refused(model: Model, stop: str | list[str]) -> None:
    with pytest.raises(UsageError, match="stop string"):
        model.generate("hi", stop=stop)


# Answers and streams. -----------------------------------------------------------------------------


def test_an_answer_and_its_usage(model: Model) -> None:
    completion = model.generate("hi", system="be brief")
    assert (completion.text, completion.finish_reason) == ("the answer is 42", "stop")
    usage = completion.usage
    assert usage.prompt_tokens == len(model.prompt_ids("hi", system="be brief"))
    assert usage.cached_tokens == 0
    assert usage.completion_tokens == len(model.tokenizer.encode(completion.text, bos=False)) + 1
    for value in (usage.time_to_first_token_s, usage.prefill_tokens_per_s, usage.decode_tokens_per_s):
        assert value is not None and value > 0


def test_the_stream_joins_to_the_completion(model: Model) -> None:
    stream = model.generate("hi", stream=True)
    with pytest.raises(GemmaEdgeError, match="not complete"):
        _ = stream.completion
    pieces = list(stream)
    assert len(pieces) > 5 and all(pieces)
    assert "".join(pieces) == stream.completion.text == "the answer is 42"


def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer, answers("né 😀!", tokenizer=tokenizer))
    assert list(model.generate("hi", stream=True)) == list("né 😀!")


def test_a_character_that_is_cut_off_by_the_length(tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer, answers("n😀", tokenizer=tokenizer))
    assert model.generate("hi", max_tokens=3).text == "n\ufffd"


def test_max_tokens(model: Model) -> None:
    completion = model.generate("hi", max_tokens=3)
    assert completion.finish_reason == "length"
    assert completion.usage.completion_tokens == 3


def test_the_end_token_as_the_last_allowed_one_is_a_stop(model: Model) -> None:
    whole = model.generate("hi").usage.completion_tokens
    assert model.generate("hi", max_tokens=whole).finish_reason == "stop"
    assert model.generate("hi", max_tokens=whole - 1).finish_reason == "length"


def test_raw_completes_the_text_after_one_bos(tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer, hash_rule)
    assert model.prompt_ids("the", raw=True) == [BOS, *tokenizer.encode("the", bos=False)]
    assert model.prompt_ids("<bos>the", raw=True) == model.prompt_ids("the", raw=True)
    assert model.generate("the", raw=True, max_tokens=4).usage.completion_tokens == 4


def test_a_chat_prompt_has_exactly_one_bos(model: Model) -> None:
    assert model.prompt_ids("hi").count(BOS) == 1


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([{"role": "user", "content": "x"}], {"raw": True}),
        ("x", {"raw": True, "system": "s"}),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "x"}], {"system": "s"}),
        ("x", {"temperature": -1}),
        ("x", {"max_tokens": 0}),
        ("\udcff", {}),
    ],
)
def test_requests_that_cannot_be_served(model: Model, prompt: object, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        model.generate(prompt, **options)  # type: ignore[call-overload]


def test_a_seed_repeats_an_answer(tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer, hash_rule)
    options = {"temperature": 50.0, "top_k": 0, "max_tokens": 20, "raw": True}
    texts = [model.generate("the", seed=seed, **options).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stream_tokens_needs_no_text(tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer, hash_rule)
    progress = GenerationProgress()
    assert list(model.stream_tokens(PROMPT, max_tokens=12, progress=progress)) == tokens(
        generator()[0], PROMPT
    )
    assert progress.usage().completion_tokens == 12


# Cancelling. --------------------------------------------------------------------------------------


def test_cancel_keeps_what_was_said_and_frees_the_model(model: Model) -> None:
    stream = model.generate("hi", stream=True)
    said = next(stream) + next(stream)
    stream.cancel()
    assert list(stream) == []
    assert (stream.completion.text, stream.completion.finish_reason) == (said, "cancelled")
    assert stream.completion.usage.completion_tokens >= 2
    assert model.generate("hi").text == "the answer is 42"


def test_a_stream_that_never_began_can_be_cancelled(model: Model) -> None:
    stream = model.generate("hi", stream=True)
    stream.cancel()
    assert (stream.completion.text, stream.completion.finish_reason) == ("", "cancelled")
    assert list(stream) == []


def test_cancelling_what_has_ended_changes_nothing(model: Model) -> None:
    stream = model.generate("hi", stream=True)
    list(stream)
    stream.cancel()
    assert stream.completion.finish_reason == "stop"


def test_leaving_the_loop_or_the_with_block_frees_the_model(model: Model) -> None:
    for _ in model.generate("hi", stream=True):
        break
    with model.generate("hi", stream=True) as stream:
        next(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert model.generate("hi").finish_reason == "stop"


def test_two_streams_at_once_are_refused(model: Model) -> None:
    first, second = model.generate("hi", stream=True), model.generate("on", stream=True)
    piece = next(first)
    with pytest.raises(UsageError, match="still streaming"):
        next(second)
    assert piece + "".join(first) == "the answer is 42"


def test_cancel_during_the_prefill(tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer, hash_rule, chunk=1)
    decoder = model.decoder
    assert isinstance(decoder, RuleDecoder)
    stream = model.generate("the the the", stream=True)

    def rule(ids: list[int]) -> int:
        if len(ids) == 5:
            stream.cancel()  # from below the running stream, as a signal handler does
        return hash_rule(ids)

    decoder.rule = rule
    assert list(stream) == []
    assert stream.completion.finish_reason == "cancelled"
    assert decoder.position == 5
    decoder.rule = hash_rule
    again = model.generate("the the the", max_tokens=5)
    assert again.usage.cached_tokens == 5  # what was prefilled is of use
    assert again.text == tiny_model(tokenizer, hash_rule).generate("the the the", max_tokens=5).text


def test_cancel_from_another_thread(tokenizer: Tokenizer) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def rule(ids: list[int]) -> int:
        if len(ids) == 40:
            reached.set()
            go_on.wait(60)
        return hash_rule(ids)

    model = tiny_model(tokenizer, rule)
    stream = model.generate("the", stream=True)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    assert reached.wait(60)
    stream.cancel()
    go_on.set()
    reader.join(60)
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.usage.completion_tokens < 100
