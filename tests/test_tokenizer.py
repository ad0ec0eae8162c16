"""Text to ids and back: special tokens, one bos, byte fallback, and characters that come in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime.errors import TokenizerError, UsageError
from gemma_edge.runtime.prompt.tokenizer import StreamDecoder, Tokenizer
from support.tiny_tokenizer import BOS, END_OF_TURN, EOS, START_OF_TURN, UNK, write_tokenizer


def byte(value: int) -> int:
    return 8 + value


def test_special_tokens_in_the_text_become_their_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<bos><start_of_turn>the<end_of_turn><eos><unk>", bos=False)
    assert ids[:2] == [BOS, START_OF_TURN]
    assert ids[-3:] == [END_OF_TURN, EOS, UNK]
    assert tokenizer.decode(ids[2:-3]) == "the"


def test_an_added_token_beyond_the_pieces(tokenizer: Tokenizer) -> None:
    image = tokenizer.n_pieces + 1
    assert tokenizer.encode("a<image_soft_token>a", bos=False)[1] == image
    assert tokenizer.decode([image]) == ""
    assert tokenizer.decode([image], skip_special=False) == "<image_soft_token>"


@pytest.mark.parametrize("text", ["the", "<bos>the", "<bos><bos>the"])
def test_exactly_one_bos(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text, bos=True) == [BOS, *tokenizer.encode("the", bos=False)]


def test_bos_only_when_asked(tokenizer: Tokenizer) -> None:
    assert BOS not in tokenizer.encode("the", bos=False)


def test_the_empty_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("", bos=False) == []
    assert tokenizer.encode("", bos=True) == [BOS]
    assert tokenizer.decode([]) == ""


def test_user_defined_text_is_not_special(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<table>\n\n", bos=False)
    assert len(ids) == 2
    assert tokenizer.decode(ids) == "<table>\n\n"


def test_special_tokens_are_skipped_unless_wanted(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<bos><start_of_turn>in<end_of_turn>", bos=False)
    assert tokenizer.decode(ids) == "in"
    assert tokenizer.decode(ids, skip_special=False) == "<bos><start_of_turn>in<end_of_turn>"


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40))
def test_decode_inverts_encode(tokenizer: Tokenizer, text: str) -> None:
    # U+2581 is how a piece spells a space: the one character that SentencePiece cannot give back.
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text.replace("\u2581", " ")


@given(ids=st.lists(st.integers(0, 330)), skip=st.booleans())
def test_the_stream_joins_to_decode(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    ids = [i % tokenizer.vocab_size for i in ids]
    stream = StreamDecoder(tokenizer, skip)
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@given(text=st.text(alphabet="é€😀", min_size=1))
def test_no_character_is_split(tokenizer: Tokenizer, text: str) -> None:
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(byte(value)) for value in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.flush() == ""


def test_an_unfinished_character_becomes_a_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    assert [stream.push(byte(0xF0)), stream.push(byte(0x9F))] == ["", ""]
    assert stream.flush() == "\ufffd"


def test_bytes_that_are_proven_wrong_are_replaced_at_once(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    letter = tokenizer.encode("e", bos=False)[0]
    assert stream.push(byte(0xFF)) == "\ufffd"
    assert stream.push(byte(0xE2)) == ""
    assert stream.push(letter) == "\ufffde"


def test_token_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(BOS) == "<bos>"
    assert tokenizer.token_text(tokenizer.encode(" the", bos=False)[0]) == "\u2581the"


def test_an_id_without_a_piece_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.n_pieces, tokenizer.vocab_size - 1]) == ""
    assert tokenizer.token_text(tokenizer.n_pieces) == ""


@pytest.mark.parametrize("beyond", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, beyond: int) -> None:
    with pytest.raises(
        UsageError, match=f"token id {beyond} is not in the vocabulary of {tokenizer.vocab_size}"
    ):
        tokenizer.decode([beyond])


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="not valid Unicode at character 2"):
        tokenizer.encode("in\udcff", bos=False)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\x03\x0a\x01a"])
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="expected a SentencePiece model"):
        Tokenizer(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.model")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TokenizerError):
        Tokenizer(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such file"):
        Tokenizer(tmp_path / "absent.model")


def test_a_model_that_adds_a_space_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=True)
    with pytest.raises(TokenizerError, match="spaces kept"):
        Tokenizer(path)
