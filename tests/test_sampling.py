"""Which tokens each option keeps, with what probability: against transformers, and by counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from gemma_edge.runtime.sampling import Sampler, Sampling

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def sampler(**options: Any) -> Sampler:
    return Sampler(Sampling(**{**OFF, "seed": 0, **options}))


def logits(size: int = 1000, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def reference(values: np.ndarray, history: list[int], options: dict[str, Any]) -> np.ndarray:
    """Probabilities (V,) after transformers' processors and warpers, in its order."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    chain = []
    if options["repetition_penalty"] != 1:
        chain.append(process.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    chain.append(process.TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        chain.append(process.TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        chain.append(process.TopPLogitsWarper(options["top_p"]))
    if options["min_p"]:
        chain.append(process.MinPLogitsWarper(options["min_p"]))
    # In double precision, so that a cumulative sum near the bound does not fall to the other side.
    scores = torch.from_numpy(values.astype(np.float64))[None]
    for step in chain:
        scores = step(torch.tensor([history]), scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 40},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7, "top_k": 64, "top_p": 0.95},
        {"temperature": 1.7, "top_k": 200, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_keeps_what_transformers_keeps(changed: dict[str, Any], seed: int) -> None:
    values, history = logits(seed=seed), [3, 999, 3, 17]
    expected = reference(values, history, {**OFF, **changed})
    ids, probabilities = sampler(**changed).distribution(values, history)
    assert sorted(ids) == np.flatnonzero(expected).tolist()
    np.testing.assert_allclose(probabilities, expected[ids], rtol=1e-5)


def test_the_whole_vocabulary_at_once_agrees_too() -> None:
    values = logits(262_400)
    expected = reference(values, [0], {**OFF, "top_p": 0.9})
    ids, _ = sampler(top_p=0.9).distribution(values)
    assert sorted(ids) == np.flatnonzero(expected).tolist()


def test_greedy_takes_the_first_of_the_highest() -> None:
    assert sampler(temperature=0).pick(np.array([1, 5, 5, 2], np.float32)) == 1


def test_greedy_obeys_the_repetition_penalty() -> None:
    values = np.array([4.0, 5.0, -1.0], np.float32)
    assert sampler(temperature=0, repetition_penalty=2.0).pick(values, [1]) == 0
    assert values.tolist() == [4.0, 5.0, -1.0]


def test_top_k_keeps_equals() -> None:
    ids, _ = sampler(top_k=2).distribution(np.array([3, 1, 2, 2, 2], np.float32))
    assert sorted(ids) == [0, 2, 3, 4]


def test_top_p_keeps_at_least_one() -> None:
    ids, probabilities = sampler(top_p=1e-9).distribution(np.zeros(8, np.float32))
    assert len(ids) == 1 and probabilities.tolist() == [1.0]


def test_forbidden_tokens_are_never_picked() -> None:
    values = np.full(50, -np.inf, np.float32)
    values[[7, 9]] = 0
    picker = sampler(temperature=5.0)
    assert {picker.pick(values) for _ in range(100)} == {7, 9}


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert sampler(temperature=1e-30).pick(np.array([1, 30, 2], np.float32)) == 1


def test_frequencies_follow_the_probabilities() -> None:
    values, draws = logits(6, scale=1.0), 20_000
    picker = sampler(seed=1)
    counts = np.bincount([picker.pick(values) for _ in range(draws)], minlength=6)
    expected = np.exp(values) / np.exp(values).sum()
    chi_square = float((((counts - draws * expected) ** 2) / (draws * expected)).sum())
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in a thousand seeds


def test_a_seed_repeats_the_choice() -> None:
    def draw(seed: int) -> list[int]:
        picker = sampler(seed=seed)
        return [picker.pick(logits()) for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


@given(
    values=st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=40),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.05, 5),
)
def test_the_likeliest_always_stays(
    values: list[float], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    array = np.array(values, np.float32)
    ids, probabilities = sampler(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature).distribution(
        array
    )
    assert array[ids].max() == pytest.approx(array.max(), abs=1e-6)  # closer logits may be equally likely
    assert probabilities.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_refused(options: dict[str, Any], bad: float) -> None:
    values = logits(20)
    values[13] = bad
    with pytest.raises(GemmaEdgeError, match=rf"highest logit is {bad}: .*`gemma-edge inspect --check`"):
        sampler(**options).pick(values)


def test_logits_that_forbid_everything_are_refused() -> None:
    with pytest.raises(GemmaEdgeError, match="-inf"):
        sampler().pick(np.full(4, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", True),
    ],
)
def test_options_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{name} must be"):
        Sampling(**{name: value})  # type: ignore[arg-type]
