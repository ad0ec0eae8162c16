"""Speculation on decoders that follow a rule: drafts, their length, what is taken back, and what is equal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime.answers import Stream
from gemma_edge.runtime.generate import TokenGenerator
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.prompt_builder import Placed, Prompt
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.residency import Residency
from gemma_edge.runtime.sampling import Sampler, Sampling
from gemma_edge.runtime.speculation.cost_curve import CostCurve, CostFile, MachineCosts
from gemma_edge.runtime.speculation.draft_policy import CREDIT, CREDIT_A_TOKEN, DraftPolicy
from gemma_edge.runtime.speculation.prompt_lookup import LONGEST_MATCH, Match, PromptLookup
from gemma_edge.runtime.usage import GenerationProgress
from support.rule_decoder import IdTable, Rule, RuleDecoder, answers
from support.tiny_tokenizer import BOS, END_OF_TURN, EOS, tiny_tokenizer

PROMPT = [BOS, *range(270, 300)]
CHEAP = CostCurve({2: 1.1, 4: 1.3, 8: 1.6, 16: 2.2})
DEAR = CostCurve({2: 1.9, 4: 3.8, 8: 7.6, 16: 15.0})
SIZES = range(2, 17)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def copying(ids: Sequence[int]) -> int:
    """Repeats the prompt over and over, from its second token on."""
    return ids[len(ids) - len(PROMPT) + 1] if len(ids) >= len(PROMPT) else 264


def generator(
    rule: Rule = copying, costs: CostCurve | None = CHEAP, **options: Any
) -> tuple[TokenGenerator, RuleDecoder]:
    decoder = RuleDecoder(rule, **{"verify_rows": SIZES, "chunk": 64, **options})
    table = IdTable()
    return TokenGenerator(Residency(decoder), table, table, costs=MachineCosts(curve=costs)), decoder


def answer(
    engine: TokenGenerator,
    prompt: Sequence[int] | Prompt = PROMPT,
    sampler: Sampler | None = None,
    **options: Any,
) -> list[int]:
    sampler = sampler or Sampler(Sampling(temperature=0.0))
    return list(engine.stream_tokens(prompt, sampler, **{"max_tokens": 100, "speculate": True, **options}))


# Guesses. -----------------------------------------------------------------------------------------


def test_the_longest_match_wins_and_of_equal_ones_the_latest() -> None:
    lookup = PromptLookup([9, 1, 2, 3, 70, 1, 2, 3, 71, 8, 2, 3, 72, 5, 1, 2, 3])
    assert lookup.match() == Match(3, 8)
    assert lookup.draft(Match(3, 8), 3) == [71, 8, 2]


def test_what_repeats_itself_goes_on() -> None:
    lookup = PromptLookup([1, 2, 3, 1, 2, 3, 1, 2])
    match = lookup.match()
    assert match and match.length == 5
    assert lookup.draft(match, 7) == [3, 1, 2, 3, 1, 2, 3]


def test_no_match_no_guess() -> None:
    assert PromptLookup([]).match() is PromptLookup([5]).match() is PromptLookup([5, 6]).match() is None
    assert PromptLookup([1, 2, 3, 2, 1]).match() is None


def test_soft_tokens_and_end_tokens_are_not_guessed() -> None:
    lookup = PromptLookup([1, 2, 3, -7, -7, 4, 1, 2])
    match = lookup.match()
    assert match and lookup.draft(match, 5) == [3]
    assert lookup.draft(match, 5, end_ids=[3]) == []


@given(st.lists(st.integers(0, 3), max_size=60))
def test_a_match_is_what_it_says(tokens: list[int]) -> None:
    lookup = PromptLookup(tokens)
    match = lookup.match()
    pairs = [tokens[i : i + 2] for i in range(len(tokens) - 2)]
    assert (match is not None) == (len(tokens) > 2 and tokens[-2:] in pairs)
    if match:
        assert 2 <= match.length <= LONGEST_MATCH and match.behind < len(tokens)
        assert tokens[match.behind - match.length : match.behind] == tokens[-match.length :]


# Costs. -------------------------------------------------------------------------------------------


def test_a_curve_lies_between_what_was_measured() -> None:
    assert [CHEAP.of(n) for n in (1, 2, 3, 8, 16)] == pytest.approx([1, 1.1, 1.2, 1.6, 2.2])
    assert CHEAP.of(32) == pytest.approx(4.4)


def test_a_disturbed_measurement_does_no_harm() -> None:
    assert [CostCurve({2: 33.0, 4: 1.5, 8: 0.5}).of(n) for n in (2, 4, 8)] == [1.0, 1.0, 1.0]
    assert CostCurve({2: 33.0}).of(2) == 2.0


def test_measuring_takes_the_quickest_of_each_size() -> None:
    calls: list[int] = []
    spikes = iter([9.0, 1.0, 1.0, 1.0, 1.0] + [1.0, 9.0, 1.0, 1.0, 1.0] + [1.0] * 5)

    def seconds(rows: int) -> float:
        calls.append(rows)
        return next(spikes) * (1 + rows / 4)

    curve = CostCurve.measured(seconds, SIZES, repetitions=3)
    assert calls == [1, 2, 4, 8, 16] * 3
    assert curve.to_json() == {"2": 1.2, "4": 1.6, "8": 2.4, "16": 4.0}


def test_a_curve_is_kept_for_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path))
    costs = MachineCosts(CostFile("abc"))
    assert costs.curve is None
    costs.measure(lambda rows: 1.0 + rows, SIZES)
    again = MachineCosts(CostFile("abc")).curve
    assert again and again.to_json() == {"2": 1.5, "4": 2.5, "8": 4.5, "16": 8.5}
    assert MachineCosts(CostFile("other")).curve is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", '{"2": "x"}', '{"2": NaN}', '{"2": Infinity}', '{"1": 1}', '{"2": 0.5}',
     '{"x": 1}', '{"2": true}', '{"999": 2}', '{"2": 1e9}', "[" * 3000, "\xff"],
)  # fmt: skip
def test_a_damaged_file_of_costs_is_measured_again(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path))
    (tmp_path / "abc.costs").write_text(text, encoding="latin-1")
    assert CostFile("abc").read() is None


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_next_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "file" / "below"))
    costs = MachineCosts(CostFile("abc"))
    assert costs.measure(lambda rows: 1.0, SIZES).of(16) == 1.0
    assert CostFile("abc").read() is None


def test_the_machine_is_measured_once_and_leaves_no_trace() -> None:
    engine, decoder = generator(costs=None)
    assert answer(engine, max_tokens=60) == answer(generator()[0], max_tokens=60, speculate=False)
    probes = [n for n in decoder.calls if n in (1, 2, 4, 8, 16)]
    assert len(probes) >= 15 and engine.costs.curve
    decoder.calls.clear()
    answer(engine, [*PROMPT, 264], max_tokens=60)
    assert decoder.calls[2:17] != [1, 2, 4, 8, 16] * 3


# How many. ----------------------------------------------------------------------------------------


def test_long_matches_get_long_drafts_and_dear_calls_none() -> None:
    policy = DraftPolicy(CHEAP)
    short, long = policy.rows(2, 16, SIZES), policy.rows(16, 16, SIZES)
    assert 1 <= short < long
    assert DraftPolicy(DEAR).rows(16, 16, SIZES) == 1


def test_the_sizes_of_a_decoder_are_filled_or_nearly() -> None:
    policy = DraftPolicy(CostCurve({4: 1.2, 8: 1.3}))
    assert policy.rows(16, 16, (4, 8)) == 8
    assert policy.rows(16, 6, (4, 8)) == 6
    assert policy.rows(16, 1, (4, 8)) == policy.rows(16, 16, ()) == 1


def test_drafts_in_vain_cool_down_and_never_lose_more_than_their_credit() -> None:
    policy, lost = DraftPolicy(CHEAP), 0.0
    for step in range(1, 400):
        rows = policy.rows(16, 16, SIZES)
        lost += CHEAP.of(rows) - 1
        policy.step(rows, 1)
        assert lost <= CREDIT + CREDIT_A_TOKEN * step + 1e-9
    # Without a word on what was right: the credit alone holds drafts back.
    assert policy.speedup > 0.97


def test_what_was_wrong_is_not_tried_even_with_credit_left() -> None:
    policy = DraftPolicy(CHEAP)
    for _ in range(20):
        policy.observe(3, False)
    assert policy.rows(3, 16, SIZES) == 1 < policy.rows(16, 16, SIZES)
    for _ in range(20):
        policy.observe(3, True)  # seen while nothing was verified
    assert policy.rows(3, 16, SIZES) > 1


def test_a_call_that_is_too_dear_to_risk_is_tried_once_guesses_were_right() -> None:
    policy = DraftPolicy(CostCurve({8: 3.6}))
    assert policy.rows(16, 16, (8,)) == 1
    for _ in range(8):
        policy.observe(16, True)
    assert policy.rows(16, 16, (8,)) == 8


# Answers. -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(264, 268), min_size=40, max_size=120), st.sampled_from([CHEAP, DEAR, None]))
def test_the_tokens_are_those_of_plain_decoding(script: list[int], costs: CostCurve | None) -> None:
    rule: Rule = lambda ids: script[len(ids) % len(script)]  # noqa: E731
    engine, decoder = generator(rule, costs)
    plain, alone = generator(rule)
    assert answer(engine) == answer(plain, speculate=False)
    assert decoder.ids == alone.ids and engine.cache.held == plain.cache.held


def test_copying_takes_a_fraction_of_the_calls() -> None:
    engine, decoder = generator()
    progress = GenerationProgress()
    tokens = answer(engine, progress=progress)
    assert tokens == answer(generator()[0], speculate=False)
    assert len(decoder.calls) < 30 < len(tokens)
    usage = progress.usage()
    assert 0 < usage.accepted_tokens <= usage.drafted_tokens
    assert usage.speedup and usage.speedup > 2
    assert usage.completion_tokens == len(tokens) == 100


def test_text_without_repetition_takes_plain_steps_alone() -> None:
    fresh = count(1000)
    made: dict[int, int] = {}
    engine, decoder = generator(lambda ids: made.setdefault(len(ids), next(fresh)), vocab_size=2000)
    progress = GenerationProgress()
    answer(engine, progress=progress)
    assert set(decoder.calls[1:]) == {1}
    assert (progress.drafted_tokens, progress.accepted_tokens, progress.speedup) == (0, 0, None)


def test_speculation_is_off_where_it_is_not_wanted_or_not_offered() -> None:
    for options in ({"speculate": False}, {}):
        engine, decoder = generator(verify_rows=SIZES if options else ())
        answer(engine, **options)
        assert set(decoder.calls[1:]) == {1}


@pytest.mark.parametrize("window", [20, 24, 40])
def test_a_ring_bounds_what_is_drafted(window: int) -> None:
    """`RuleDecoder.truncate` refuses to go back further than its ring reaches."""
    rule: Rule = lambda ids: 264 + len(ids) % 5  # noqa: E731
    engine, decoder = generator(rule, window=window)
    assert answer(engine, [BOS, 264, 265], max_tokens=90) == answer(
        generator(rule)[0], [BOS, 264, 265], max_tokens=90, speculate=False
    )
    assert decoder.ids[-1]


@pytest.mark.parametrize("context", [34, 35, 40, 47, 64])
def test_a_context_that_is_nearly_full_is_filled_and_not_overrun(context: int) -> None:
    engine, decoder = generator(context=context)
    tokens = answer(engine, max_tokens=None)
    assert len(tokens) == context - len(PROMPT) and decoder.position <= context
    assert tokens == answer(generator(context=context)[0], max_tokens=None, speculate=False)


@pytest.mark.parametrize("limit", range(1, 24))
def test_no_token_beyond_the_limit_is_drafted(limit: int) -> None:
    engine, decoder = generator()
    assert len(answer(engine, max_tokens=limit)) == limit
    assert decoder.position == len(PROMPT) + limit - 1


def test_an_end_token_ends_and_nothing_behind_it_stays_in_the_cache() -> None:
    prompt = [BOS, *range(270, 280), EOS, *range(280, 290)]
    script = [*range(270, 280), EOS]
    rule: Rule = lambda ids: script[min(len(ids) - len(prompt), 10)] if len(ids) >= len(prompt) else 0  # noqa: E731
    engine, decoder = generator(rule)
    assert answer(engine, prompt, end_ids=[EOS]) == script
    assert decoder.ids == [*prompt, *script[:-1]] and engine.cache.held == decoder.ids


def test_stopping_in_the_middle_takes_the_rest_of_the_draft_back() -> None:
    engine, decoder = generator()
    stream = engine.stream_tokens(PROMPT, Sampler(Sampling(temperature=0.0)), speculate=True)
    taken = [next(stream)]
    while decoder.position <= len(PROMPT) + len(taken):  # until a draft is under way
        taken.append(next(stream))
    stream.close()
    assert decoder.ids == PROMPT + taken[:-1] == engine.cache.held
    progress = GenerationProgress()
    longer = [*PROMPT, *taken, 264]
    answer(engine, longer, max_tokens=4, progress=progress)
    assert progress.cached_tokens == len(longer) - 2


def test_cancelling_between_tokens_of_a_draft_ends_the_answer_there() -> None:
    engine, decoder = generator()
    seen: list[int] = []
    stream = engine.stream_tokens(
        PROMPT, Sampler(Sampling(temperature=0.0)), speculate=True, cancelled=lambda: len(seen) >= 17
    )
    for token in stream:
        seen.append(token)
    assert len(seen) in (17, 18) and decoder.ids == [*PROMPT, *seen[:-1]]


def test_soft_tokens_of_a_picture_are_matched_by_nothing_and_drafted_never() -> None:
    class Picture:
        key, name = 5, "p"

    ids = [BOS, 270, 271, 300, 300, 300, 272, 273, 270, 271]
    prompt = Prompt(ids, placed=(Placed(3, 6, Picture()),))  # type: ignore[arg-type]
    lookup = PromptLookup(prompt.keys)
    match = lookup.match()
    assert match and lookup.draft(match, 4) == []


# Sampling. ----------------------------------------------------------------------------------------


class DiceDecoder(RuleDecoder):
    """Logits that depend on the last two ids, near enough to each other that every pick is a gamble."""

    def forward(self, embeddings: Any, per_layer: Any, n_logits: int = 1) -> Any:
        super().forward(embeddings, per_layer, n_logits)
        behind = range(len(self.ids) - n_logits + 1, len(self.ids) + 1)
        return np.stack([self.row(*self.ids[n - 2 : n]) for n in behind]) if n_logits else np.zeros((0, 8))

    @staticmethod
    def row(before: int, last: int) -> Any:
        return np.random.default_rng([before, last]).normal(size=8).astype(np.float32)


def dice(**sampling: Any) -> tuple[TokenGenerator, Sampler]:
    decoder = DiceDecoder(lambda ids: 0, verify_rows=SIZES, chunk=64, vocab_size=8, context=4096)
    costs = MachineCosts(curve=CostCurve({2: 1.01, 16: 1.1}))
    sampler = Sampler(Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **sampling}))
    return TokenGenerator(Residency(decoder), IdTable(), IdTable(), costs=costs), sampler


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"top_k": 3}, {"temperature": 0.3}])
def test_a_seed_gives_the_answer_of_plain_decoding(options: dict[str, float]) -> None:
    prompt, made = [1, 2, 3, 1, 2, 4, 1, 2], []
    for speculate in (True, False):
        engine, sampler = dice(seed=7, **options)
        progress = GenerationProgress()
        made.append(answer(engine, prompt, sampler, max_tokens=600, speculate=speculate, progress=progress))
        assert bool(progress.drafted_tokens) == speculate
    assert made[0] == made[1]


def test_sampling_keeps_the_distribution() -> None:
    """How often each token follows each pair, against the model's own probabilities: chi squared."""
    engine, sampler = dice(seed=11)
    progress = GenerationProgress()
    tokens = answer(engine, [1, 2, 3, 1, 2], sampler, max_tokens=4000, progress=progress)
    assert progress.accepted_tokens > 400 and progress.drafted_tokens > progress.accepted_tokens
    said = [1, 2, *tokens]
    follows: dict[tuple[int, int], Counter[int]] = {}
    for a, b, c in zip(said, said[1:], said[2:], strict=False):
        follows.setdefault((a, b), Counter())[c] += 1
    statistic = freedom = 0.0
    for (a, b), counts in follows.items():
        weights = np.exp(DiceDecoder.row(a, b).astype(np.float64))
        expected = weights / weights.sum() * counts.total()
        kept = expected >= 5
        deviations = np.array([counts[i] for i in range(8)]) - expected
        statistic += float((deviations[kept] ** 2 / expected[kept]).sum())
        freedom += float(kept.sum()) - 1
    assert freedom > 100
    # Above its mean by less than five standard deviations; picking the draft half as often again is above 20.
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


# Text. --------------------------------------------------------------------------------------------


REPEATED = "the heat in the tin hat and the heat in the tin hat and the heat in the tin hat"


def texts(tokenizer: Tokenizer, said: str = REPEATED, **options: Any) -> Model:
    decoder = RuleDecoder(answers(said, tokenizer=tokenizer), verify_rows=SIZES, chunk=64)
    costs = MachineCosts(curve=CHEAP)
    sampling = Sampling(temperature=0.0)
    return Model(
        decoder, IdTable(), IdTable(), tokenizer, sampling=sampling, end_ids=[EOS, END_OF_TURN], costs=costs
    )


def both(tokenizer: Tokenizer, said: str = REPEATED, **options: Any) -> Iterator[Stream]:
    for speculate in (True, False):
        yield texts(tokenizer, said).generate("hi", stream=True, speculate=speculate, **options)


def test_pieces_come_in_the_same_order_and_cut(tokenizer: Tokenizer) -> None:
    first, second = both(tokenizer)
    assert list(first) == list(second)
    assert first.completion.text == REPEATED == second.completion.text
    assert first.completion.usage.accepted_tokens > 0 == second.completion.usage.accepted_tokens
    assert first.completion.finish_reason == "stop"


def test_a_predicted_text_is_a_source_of_drafts(tokenizer: Tokenizer) -> None:
    said = "the tin hat in the heat"  # it repeats nothing
    plain = texts(tokenizer, said).generate("hi", speculate=True)
    predicted = texts(tokenizer, said).generate("hi", speculate=f"{said} and the hat")
    wrong = texts(tokenizer, said).generate("hi", speculate="hat hat tin tin")
    assert plain.text == predicted.text == wrong.text == said
    assert predicted.usage.accepted_tokens > plain.usage.accepted_tokens == 0
    assert texts(tokenizer, said).generate("hi", speculate="").usage.drafted_tokens == 0


@pytest.mark.parametrize("stop", ["tin", "hat and", "heat in the tin hat and the he", "never"])
def test_stop_strings_end_inside_a_draft(tokenizer: Tokenizer, stop: str) -> None:
    first, second = both(tokenizer, stop=stop)
    assert list(first) == list(second)
    assert first.completion.text == REPEATED.partition(stop)[0]
    assert first.completion.finish_reason == second.completion.finish_reason


def test_logprobs_are_of_every_token_once(tokenizer: Tokenizer) -> None:
    first, second = both(tokenizer, logprobs=3)
    assert list(first) == list(second)
    assert first.completion.logprobs == second.completion.logprobs
    assert len(first.completion.logprobs or ()) == first.completion.usage.completion_tokens


@pytest.mark.parametrize(
    "form", [{"choices": [REPEATED, "the end"]}, {"regex": "(the heat in the tin hat( and )?){1,4}"}]
)
def test_a_constraint_holds_and_trims_drafts(tokenizer: Tokenizer, form: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    # The model would go on without end: the form alone ends the answer.
    said = f"{REPEATED} and " * 3
    first, second = both(tokenizer, said, **form)
    assert list(first) == list(second)
    assert first.completion.usage.accepted_tokens > 0


def test_a_guard_ends_an_answer_inside_a_draft(tokenizer: Tokenizer) -> None:
    first, second = both(tokenizer, guard=lambda stage, text: text.count("tin") < 3)
    assert list(first) == list(second)
    assert first.completion.finish_reason == "filtered"


def test_usage_is_json(tokenizer: Tokenizer) -> None:
    stream = next(both(tokenizer))
    list(stream)
    usage = json.loads(json.dumps(stream.completion.to_dict()))["usage"]
    assert usage["accepted_tokens"] <= usage["drafted_tokens"] and usage["speedup"] > 1
