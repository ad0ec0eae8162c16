"""tokenizer.json to SentencePiece: the same ids on any text, or a refusal that names the reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.tokenizer_files import convert, tokenizer_files
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.errors import TokenizerError
from support.gemma_tokenizer_json import SOFT, SPECIAL, TEXT, USER, Json, gemma_json

tokenizers = pytest.importorskip("tokenizers")

DATA = gemma_json()
REFERENCE = tokenizers.Tokenizer.from_str(json.dumps(DATA))
MODEL = convert(DATA, {}, Path("tokenizer.json"))
CONVERTED = sentencepiece.SentencePieceProcessor(model_proto=MODEL)


def same(text: str) -> None:
    expected = REFERENCE.encode(text, add_special_tokens=False)
    assert CONVERTED.encode(text) == expected.ids, expected.tokens


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "",
        " ",
        "  two   three    four     five",
        " leading and trailing ",
        "\n\n\n\n\n a\n\nb\n",
        "tabs\tand\t\tmore\t\t\t",
        "<start_of_turn>user\nthe man<end_of_turn>\n<start_of_turn>model\n",
        "nested <b>bold</b> <<b>> <start_of_<start_of_turn>",
        "你好, мир! שלום 🙂👩‍👩‍👧 e\u0301 \u00a0\u200b\ufeff",
        "already ▁ escaped ▁▁ twice",
        "<0x41> is text",
        "nul \x00 and \x7f",
        "bananabandananananana gardenergardener",
    ],
)
def test_same_ids(text: str) -> None:
    same(text)
    assert CONVERTED.decode(CONVERTED.encode(text)) == text.replace("▁", " ")


WORDS = st.sampled_from([*USER, *SPECIAL[4:], *TEXT.split(), " ", "the", "an", "na", "é", "你", "🙂"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(WORDS, st.text(max_size=4), st.text("abcdegnorth ▁\n", max_size=12)), max_size=12))
def test_same_ids_on_any_text(parts: list[str]) -> None:
    text = "".join(parts)
    if not any(control in text for control in SPECIAL[:4]):
        same(text)


def test_special_ids_and_kinds() -> None:
    assert (CONVERTED.pad_id(), CONVERTED.eos_id(), CONVERTED.bos_id(), CONVERTED.unk_id()) == (0, 1, 2, 3)
    assert CONVERTED.is_control(2) and CONVERTED.is_unknown(3) and not CONVERTED.is_control(4)
    assert CONVERTED.is_byte(CONVERTED.piece_to_id("<0x00>"))
    # The text of a control piece is not the piece.
    assert 2 not in CONVERTED.encode("<bos>")
    assert CONVERTED.get_piece_size() == len(DATA["model"]["vocab"])


def test_names_of_the_special_tokens_come_from_tokenizer_config() -> None:
    data = json.loads(json.dumps(DATA).replace("<eos>", "</s>"))
    model = convert(data, {"eos_token": {"content": "</s>"}}, Path("tokenizer.json"))
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.eos_id() == 1 and tokenizer.is_control(1)


def test_merges_may_be_strings() -> None:
    data = copy.deepcopy(DATA)
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    assert convert(data, {}, Path("t")) == MODEL


@pytest.mark.parametrize("keep_byte", [True, False])
def test_a_tab_that_shares_the_id_of_its_byte(keep_byte: bool) -> None:
    """Converters of early Gemma models put the tab beside, or in the place of, byte 9."""
    data = copy.deepcopy(DATA)
    vocab = data["model"]["vocab"]
    vocab["\t"] = vocab["<0x09>"] if keep_byte else vocab.pop("<0x09>")
    assert convert(data, {}, Path("t")) == MODEL


# Refusals. ----------------------------------------------------------------------------------------


def _model(**changes: Any) -> Callable[[Json], Any]:
    return lambda data: data["model"].update(changes)


def _drop_split(data: Json) -> None:
    """Removes one of several splits of a piece: Hugging Face would no longer make it from those two."""
    merges = data["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    del merges[next(i for i, piece in enumerate(made) if made.count(piece) > 1)]


def _scatter(data: Json) -> None:
    merges = data["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    merges.append(merges.pop(next(i for i, piece in enumerate(made) if made.count(piece) > 1)))


REFUSALS: dict[str, tuple[Callable[[Json], Any], str]] = {
    "WordPiece": (_model(type="WordPiece"), "model.type"),
    "Unigram": (_model(type="Unigram"), "model.type"),
    "no model": (lambda data: data.update(model=None), "model"),
    "no byte fallback": (_model(byte_fallback=False), "model.byte_fallback"),
    "ignore merges": (_model(ignore_merges=True), "model.ignore_merges"),
    "dropout": (_model(dropout=0.1), "model.dropout"),
    "suffix": (_model(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
    "unknown unk": (_model(unk_token="[UNK]"), "model.unk_token"),
    "merge of unknown pieces": (_model(merges=[["x", "no such piece"]]), "model.merges[0]"),
    "merge of one": (_model(merges=["a"]), "model.merges[0]"),
    "a split that is not listed": (_drop_split, "model.merges"),
    "merges out of order": (_scatter, "model.merges"),
    "a missing byte": (
        lambda d: d["model"]["vocab"].update({"q": d["model"]["vocab"].pop("<0x80>")}),
        "model.vocab",
    ),
    "a hole in the ids": (lambda d: d["model"]["vocab"].update({"the": 9999}), "id of"),
    "two texts for an id": (lambda d: d["model"]["vocab"].update({"qq": 300}), "id 300"),
    "NFC": (lambda data: data.update(normalizer={"type": "NFC"}), "normalizer"),
    "no normalizer": (lambda data: data.update(normalizer=None), "normalizer"),
    "dummy prefix": (
        lambda d: d.update(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, d["normalizer"]],
            }
        ),
        "normalizer",
    ),
    "ByteLevel": (lambda data: data.update(pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer"),
    "stripping": (lambda data: data["added_tokens"][-1].update(lstrip=True), "added_tokens"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_expressed_is_refused(name: str) -> None:
    change, field = REFUSALS[name]
    data = copy.deepcopy(DATA)
    change(data)
    with pytest.raises(TokenizerError) as caught:
        convert(data, {}, Path("tokenizer.json"))
    assert caught.value.field.startswith(field) and "tokenizer.model" in caught.value.remedy


def test_half_a_character_is_refused() -> None:
    with pytest.raises(TokenizerError, match="text of a token: expected valid Unicode"):
        convert(DATA, {"pad_token": "\ud800"}, Path("tokenizer.json"))


# A checkpoint's files. ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return synthesize(
        tmp_path / "checkpoint", config={"vocab_size": 640, "vocab_size_per_layer_input": 600}
    ).path


def test_the_checkpoints_own_model_comes_first(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(DATA))
    with Checkpoint.open(folder) as checkpoint:
        files = tokenizer_files(checkpoint)
    assert files.model == (folder / "tokenizer.model").read_bytes() and files.source == "tokenizer.model"
    assert files.added_tokens["<audio_soft_token>"] == 621


def test_tokenizer_json_alone_is_converted(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(DATA))
    with Checkpoint.open(folder) as checkpoint:
        files = tokenizer_files(checkpoint)
    assert files.model == MODEL and files.source == "tokenizer.json"
    assert files.added_tokens == {SOFT: len(DATA["model"]["vocab"])}


def test_a_tokenizer_that_is_missing_damaged_or_too_large_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.model"
    good = path.read_bytes()
    with Checkpoint.open(folder) as checkpoint:
        for bad in (b"", b"not a model", good[: len(good) // 2]):
            path.write_bytes(bad)
            with pytest.raises(TokenizerError, match="SentencePiece model"):
                tokenizer_files(checkpoint)
        path.unlink()
        with pytest.raises(TokenizerError, match="neither"):
            tokenizer_files(checkpoint)
    small = synthesize(folder.parent / "small", config={"vocab_size": 520}).path
    (small / "tokenizer.model").write_bytes(good)
    with Checkpoint.open(small) as checkpoint, pytest.raises(TokenizerError, match="vocab_size = 520"):
        tokenizer_files(checkpoint)


def test_an_added_token_beyond_the_vocabulary_is_refused(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["640"] = {"content": "<far>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with Checkpoint.open(folder) as checkpoint, pytest.raises(TokenizerError, match="<far>"):
        tokenizer_files(checkpoint)
