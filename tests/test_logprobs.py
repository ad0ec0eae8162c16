"""Log-probabilities of tokens, and biases of their logits."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.logprobs import LogprobRecorder, _likeliest, bias_by_id
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.sampling import Sampler, Sampling
from support.rule_decoder import answers, tiny_model
from support.tiny_tokenizer import END_OF_TURN

GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Model:
    return tiny_model(tokenizer, answers("the é", tokenizer=tokenizer))


@given(st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_logprobs_are_those_of_the_models_distribution(tokenizer: Tokenizer, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(315) * 5).astype(np.float32)
    logits[rng.integers(315, size=3)] = -np.inf
    recorder = LogprobRecorder(tokenizer, count)
    # Whatever is done to the logits before the choice is not in the report.
    sampler = Sampler(Sampling(temperature=3.0, seed=seed), bias={7: 50.0}, observe=recorder)
    picked = sampler.pick(logits, [7])
    exact = logits.astype(np.float64)
    exact -= math.log(np.exp(exact).sum())
    (entry,) = recorder.tokens
    assert entry.token_id == picked and entry.logprob == pytest.approx(exact[picked], abs=1e-4)
    assert [a.token_id for a in entry.alternatives] == [int(i) for i in np.argsort(-exact)[:count]]
    assert [a.logprob for a in entry.alternatives] == pytest.approx(
        sorted(exact, reverse=True)[:count], abs=1e-4
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from([5, 300, 6000]), st.booleans())
def test_the_likeliest_are_found_among_equals_too(seed: int, count: int, size: int, ties: bool) -> None:
    logits = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    if ties:
        logits = np.round(logits)
    logits[::3] = -np.inf
    wanted = [int(i) for i in np.argsort(-logits, kind="stable")[:count] if np.isfinite(logits[i])]
    assert _likeliest(logits, count) == wanted


def test_a_completion_reports_every_token_while_it_streams_and_after(model: Model) -> None:
    stream = model.generate("x", stream=True, logprobs=2)
    assert len(stream.logprobs) == 0
    next(stream)
    assert len(stream.logprobs) == 1
    for _ in stream:
        pass
    completion = stream.completion
    assert completion.logprobs is not None
    assert len(completion.logprobs) == completion.usage.completion_tokens
    assert b"".join(token.bytes for token in completion.logprobs).decode() == completion.text == "the é"
    assert completion.logprobs[-1].token_id == END_OF_TURN
    assert completion.logprobs[-1].text == "<end_of_turn>" and completion.logprobs[-1].bytes == b""
    assert all(token.logprob > -0.02 and len(token.alternatives) == 2 for token in completion.logprobs)
    (entry, *_) = json.loads(json.dumps(completion.to_dict()))["logprobs"]
    assert list(entry) == ["id", "token", "bytes", "logprob", "top_logprobs"]


def test_nothing_is_reported_unless_asked_for(model: Model) -> None:
    completion = model.generate("x")
    assert completion.logprobs is None and "logprobs" not in completion.to_dict()
    entry = model.generate("x", logprobs=0).to_dict()["logprobs"][0]
    assert "top_logprobs" not in entry


@pytest.mark.parametrize("count", [-1, 21, True, "2", 1.0])
def test_a_count_out_of_range_is_named(model: Model, count: Any) -> None:
    with pytest.raises(UsageError, match=r"^logprobs must be an integer from 0 to 20"):
        model.generate("x", logprobs=count)


def test_a_bias_moves_what_is_picked(tokenizer: Tokenizer) -> None:
    logits = np.zeros(315, np.float32)
    logits[20] = 10
    assert Sampler(GREEDY).pick(logits) == 20
    assert Sampler(GREEDY, bias={20: -100}).pick(logits) == 0
    assert Sampler(GREEDY, bias={30: 11}).pick(logits) == 30
    assert logits[20] == 10 and logits[30] == 0
    picks = {Sampler(Sampling(seed=seed), bias={30: 10.0, 20: -5.0}).pick(logits) for seed in range(20)}
    assert picks == {20, 30} or picks == {30}
    ids, probabilities = Sampler(Sampling(top_k=0, top_p=1), bias={20: -10.0 + math.log(3)}).distribution(
        logits
    )
    assert probabilities[ids == 20] == pytest.approx(3 / (3 + 314))


def test_a_bias_names_tokens_by_id_and_text(model: Model, tokenizer: Tokenizer) -> None:
    the = tokenizer.encode("the", bos=False)
    assert len(the) == 1
    assert bias_by_id({"the": 3, 5: -1, "id:6": 2}, tokenizer) == {the[0]: 3.0, 5: -1.0, 6: 2.0}
    assert model.generate("x", logit_bias={"the": -100.0, END_OF_TURN: 100.0}).text == ""


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"theeth": 1}, "not one token but"),
        ({"": 1}, r"not one token but 0 \(nothing\)"),
        ({-1: 1}, "token id -1 is not in the vocabulary"),
        ({"id:999999999": 1}, "token id 999999999 is not"),
        ({5: 101}, "must be a number from -100 to 100"),
        ({5: float("nan")}, "must be a number from -100 to 100"),
        ({5: "1"}, "must be a number"),
        ({5: True}, "must be a number"),
        ({None: 1}, "a token is an id or a text"),
        ([5], "must map tokens to numbers"),
        ({"\ud800": 1}, "not valid Unicode"),
    ],
)
def test_a_bias_that_cannot_be_is_named(model: Model, bias: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.generate("x", logit_bias=bias)
