"""A prompt that is too long: cut where the caller says, whole everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.prompt.truncation import GAP, longest_prompt
from support.rule_decoder import hash_rule, tiny_model
from support.tiny_tokenizer import tiny_tokenizer

CONTEXT = 128
FRAME = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return tiny_model(tokenizer, hash_rule, context=CONTEXT)


def said(model: Model, text: str, **options: Any) -> str:
    """The user's text in a prompt that fits, whose frame is whole."""
    prompt = model.prompt(text, **options)
    before, after = FRAME.split("{}")
    assert prompt.text.startswith(before) and prompt.text.endswith(after)
    assert len(prompt.ids) <= longest_prompt(CONTEXT, options.get("max_tokens"))
    return prompt.text[len(before) : -len(after)]


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    st.sampled_from(["start", "end", "middle"]),
)
def test_what_is_left_is_part_of_the_text(model: Model, text: str, side: Any) -> None:
    prompt = model.prompt("x" + text + "x", truncate=side)
    left = said(model, "x" + text + "x", truncate=side)
    whole = "x" + text + "x"
    if not prompt.left_out:
        assert left == whole
    elif side == "start":
        assert whole.endswith(left)
    elif side == "end":
        assert whole.startswith(left)
    else:
        head, gap, tail = left.partition(GAP)
        assert gap and whole.startswith(head) and whole.endswith(tail)


def test_each_side_and_what_it_leaves_out(model: Model) -> None:
    text = "".join(f"{number:04} " for number in range(200)).strip()
    assert said(model, text, truncate="start").endswith("0198 0199")
    assert said(model, text, truncate="end").startswith("0000 0001")
    middle = said(model, text, truncate="middle")
    assert middle.startswith("0000 ") and middle.endswith(" 0199") and GAP in middle
    prompt = model.prompt(text, truncate="end")
    # As much stays as fits.
    assert longest_prompt(CONTEXT, None) - len(prompt.ids) <= 6
    assert prompt.left_out >= len(model.tokenizer.encode(text, bos=False)) - CONTEXT


def test_no_half_character_is_left(model: Model) -> None:
    for side in ("start", "end", "middle"):
        left = said(model, "é" * 300, truncate=side)
        assert set(left.replace(GAP, "")) == {"é"}


def test_room_is_left_for_the_answer(model: Model) -> None:
    assert longest_prompt(128, None) == 96 and longest_prompt(4096, None) == 3840
    assert longest_prompt(128, 10) == 118 and longest_prompt(128, 1000) == 64 and longest_prompt(1, None) == 0
    for max_tokens in (1, 20, 1000):
        answer = model.generate("e" * 500, truncate="end", max_tokens=max_tokens, temperature=0)
        assert answer.usage.completion_tokens >= min(max_tokens, CONTEXT // 2)


def test_only_the_longest_text_of_the_last_user_message_is_cut(model: Model) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "second"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "short"}, {"type": "text", "text": "e" * 500}],
        },
    ]
    text = model.prompt(turns, truncate="end").text
    assert "first<end" in text and "second<end" in text and "shorteeee" in text
    assert len(turns[2]["content"][1]["text"]) == 500


def test_a_raw_prompt_is_cut_too(model: Model) -> None:
    prompt = model.prompt("a" + "e" * 500, raw=True, truncate="end")
    assert prompt.text.startswith("aee") and len(prompt.ids) <= 96


def test_without_the_option_it_is_an_error(model: Model) -> None:
    with pytest.raises(UsageError, match="context of 128 must hold it"):
        model.generate("e" * 500)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            [
                {"role": "user", "content": "e" * 300},
                {"role": "assistant", "content": "e"},
                {"role": "user", "content": "e"},
            ],
            "beside the text that can be cut",
        ),
        ([{"role": "user", "content": ["e"]}], "must be"),
    ],
)
def test_what_cannot_be_cut_is_named(model: Model, turns: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.prompt(turns, truncate="end")


def test_an_unknown_side_is_named(model: Model) -> None:
    with pytest.raises(UsageError, match="truncate must be one of start, end, middle, not 'left'"):
        model.generate("hi", truncate="left")  # type: ignore[call-overload]


def test_the_tokenizer_takes_special_tokens_out(model: Model) -> None:
    tokenizer: Tokenizer = model.tokenizer
    text = tokenizer.without_special("a<start_of_turn>b<end_of_<bos>turn>")
    assert text == "a b<end_of_ turn>"
