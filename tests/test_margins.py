"""The judges of tokens: they let near ties pass, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from support.margins import assert_allowed, assert_decided, leads

# Decided, nearly tied, decided.
LOGITS = np.array([[0, 5, 1], [3, 2.9, 0], [1, 2, 7]], np.float32)
ERROR = 0.1


def test_leads() -> None:
    np.testing.assert_allclose(leads(LOGITS), [4, 0.1, 5], atol=1e-6)


@pytest.mark.parametrize("tokens", [[1, 0, 2], [1, 1, 2]])
def test_either_token_of_a_tie_is_allowed(tokens: list[int]) -> None:
    assert_allowed(tokens, LOGITS, ERROR, decided=0.6)


@pytest.mark.parametrize("tokens", [[2, 0, 2], [1, 2, 2], [1, 0, 1], [1, 0]])
def test_other_tokens_are_not(tokens: list[int]) -> None:
    with pytest.raises(AssertionError):
        assert_allowed(tokens, LOGITS, ERROR, decided=0.6)


def test_too_many_ties_judge_nothing() -> None:
    with pytest.raises(AssertionError):
        assert_allowed([1, 0, 2], LOGITS, ERROR, decided=0.7)
    with pytest.raises(AssertionError, match="near tie"):
        assert_decided(LOGITS, ERROR)
    assert_decided(LOGITS[::2], ERROR)
