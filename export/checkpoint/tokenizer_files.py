"""The bundle's tokenizer.model: the checkpoint's own, or tokenizer.json converted to SentencePiece.

The conversion gives the same ids, or is refused. SentencePiece merges any adjacent pair whose concatenation
is a piece, best score first; Hugging Face merges only the listed pairs, lowest rank first. Both agree when
every split of a piece into two pieces is listed and the merges are grouped by the piece they make, which is
the form of Gemma's own tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import sentencepiece

from gemma_edge.export.checkpoint.checkpoint import MAX_SIDE_BYTES, Checkpoint
from gemma_edge.export.checkpoint.sentencepiece_model import BYTE_PIECES, SPACE, Piece, PieceKind, build_model
from gemma_edge.runtime.errors import TokenizerError
from gemma_edge.runtime.files.text_files import read_bytes

ORIGINAL = "Put the original tokenizer.model of the model beside it."
SPACE_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
CONFIG = "tokenizer_config.json"
MAX_ADDED_TOKENS = 20_000  # Gemma has 6,414
SPECIAL_DEFAULTS = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>"}


@dataclass(frozen=True)
class TokenizerFiles:
    """What a bundle needs to tokenize.

    Attributes:
        model: a serialized SentencePiece model.
        added_tokens: ids beyond the model's pieces, by text, e.g. <image_soft_token> 262145.
        source: the name of the file the model comes from.
    """

    model: bytes
    added_tokens: dict[str, int]
    source: str


def tokenizer_files(checkpoint: Checkpoint) -> TokenizerFiles:
    """The tokenizer of a checkpoint.

    Raises:
        TokenizerError: there is none, it cannot be loaded, has ids beyond the vocabulary, or tokenizer.json
        is
            of a kind that SentencePiece BPE cannot express.
    """
    files = checkpoint.files()
    data = checkpoint.json("tokenizer.json")
    config = checkpoint.json("tokenizer_config.json")
    if original := files.get("tokenizer.model"):
        path, model = original, read_bytes(original, TokenizerError, limit=MAX_SIDE_BYTES)
    elif converted := files.get("tokenizer.json"):
        path, model = converted, convert(data, config, converted)
    else:
        raise TokenizerError(checkpoint.path, "tokenizer", "tokenizer.model or tokenizer.json", "neither")
    pieces = _piece_count(path, model)
    vocab_size = checkpoint.config.vocab_size
    if pieces > vocab_size:
        raise TokenizerError(path, "pieces", f"at most vocab_size = {vocab_size}", pieces)
    added = {text: index for text, index in _added_tokens(data, config, path).items() if index >= pieces}
    for text, index in added.items():
        if index >= vocab_size:
            raise TokenizerError(
                path, f"added token {text!r}", f"an id below vocab_size = {vocab_size}", index
            )
    return TokenizerFiles(model, dict(sorted(added.items(), key=lambda item: item[1])), path.name)


def convert(data: dict[str, Any], config: dict[str, Any], path: Path) -> bytes:
    """A serialized SentencePiece model that gives the ids of a tokenizer.json.

    Args:
        data: the parsed tokenizer.json: BPE with byte fallback in Gemma's form.
        config: the parsed tokenizer_config.json or {}; it names the pad, eos and bos tokens.
        path: names the file in errors.

    The text of pad, eos and bos is not recognised inside a prompt (they are CONTROL pieces, as in Gemma's own
    tokenizer.model); every other added token is.

    Raises:
        TokenizerError: malformed, or not expressible.
    """
    vocab, merges, unk = _model(data, path)
    _check_pipeline(data, path)
    added = _added_tokens(data, {}, path)
    _check_flags(data, path)
    texts = _texts_by_id(vocab, added, path)
    special = {name: _text(config.get(f"{name}_token")) or text for name, text in SPECIAL_DEFAULTS.items()}
    try:
        "".join((*texts, *special.values())).encode()
    except UnicodeEncodeError as error:
        _refuse(path, "text of a token", "valid Unicode", f"half of a pair, {error.object[error.start]!r}")
    kinds = dict.fromkeys(added, PieceKind.USER_DEFINED)
    kinds |= dict.fromkeys(special.values(), PieceKind.CONTROL)
    kinds |= dict.fromkeys(BYTE_PIECES, PieceKind.BYTE)
    kinds[unk] = PieceKind.UNKNOWN
    if absent := [text for text in BYTE_PIECES if text not in texts]:
        raise TokenizerError(
            path, "model.vocab", f"all 256 byte pieces, {absent[0]} among them", "none", ORIGINAL
        )
    ranks = _ranks(merges, {text for text in texts if text not in kinds}, path)
    unmerged = -float(len(merges))
    pieces = [
        Piece(text, kind := kinds.get(text, PieceKind.NORMAL), _score(kind, ranks.get(text), unmerged))
        for text in texts
    ]
    return build_model(pieces, unk=unk, **special)


def _score(kind: PieceKind, rank: int | None, unmerged: float) -> float:
    if kind is not PieceKind.NORMAL:
        return 0.0
    return unmerged if rank is None else -float(rank)


def _model(data: dict[str, Any], path: Path) -> tuple[dict[str, int], list[tuple[str, str]], str]:
    """Vocabulary, merges and unknown token of the model, after refusing what is not Gemma's kind of BPE."""
    model = data.get("model")
    if not isinstance(model, dict):
        _refuse(path, "model", "an object", type(model).__name__)
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        _refuse(path, "model.type", "BPE", kind)
    for key, expected in (("byte_fallback", True), ("ignore_merges", False)):
        if bool(model.get(key)) is not expected:
            _refuse(path, f"model.{key}", expected, model.get(key))
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            _refuse(path, f"model.{key}", None, repr(model[key]))
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not all(isinstance(v, int) and v >= 0 for v in vocab.values()):
        _refuse(path, "model.vocab", "an object of text: id", type(vocab).__name__)
    if not isinstance(merges, list):
        _refuse(path, "model.merges", "a list", type(merges).__name__)
    pairs = []
    for index, merge in enumerate(merges):
        # "a b" until tokenizers 0.20, ["a", "b"] since.
        pair = (
            tuple(merge.split(" "))
            if isinstance(merge, str)
            else tuple(merge)
            if isinstance(merge, list)
            else ()
        )
        if len(pair) != 2 or not all(isinstance(part, str) and part in vocab for part in pair):
            _refuse(path, f"model.merges[{index}]", "two pieces of the vocabulary", repr(merge))
        pairs.append((pair[0], pair[1]))
    unk = model.get("unk_token")
    if not isinstance(unk, str) or unk not in vocab:
        _refuse(path, "model.unk_token", "a piece of the vocabulary", repr(unk))
    return vocab, pairs, unk


def _check_pipeline(data: dict[str, Any], path: Path) -> None:
    """Spaces become "▁" and nothing else happens before BPE."""
    normalizer = data.get("normalizer")
    steps = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
    steps = [normalizer] if steps is None else steps
    if steps != [SPACE_NORMALIZER]:
        _refuse(path, "normalizer", f'Replace " " with "{SPACE}"', [_type(step) for step in steps])
    pre_tokenizer = data.get("pre_tokenizer")
    # No space is left to split at after the normalizer.
    harmless = pre_tokenizer is None or (
        isinstance(pre_tokenizer, dict)
        and pre_tokenizer.get("type") == "Split"
        and pre_tokenizer.get("pattern") == {"String": " "}
        and not pre_tokenizer.get("invert")
    )
    if not harmless:
        _refuse(path, "pre_tokenizer", 'none, or Split at " "', _type(pre_tokenizer))


def _type(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else part


def _check_flags(data: dict[str, Any], path: Path) -> None:
    for token in data.get("added_tokens") or []:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                _refuse(path, f"added_tokens {token['content']!r}", f"{flag} false", True)


def _texts_by_id(vocab: dict[str, int], added: dict[str, int], path: Path) -> list[str]:
    """Piece texts by id: the contiguous ids from 0, without added tokens that only follow the vocabulary."""
    texts: dict[int, str] = {}
    for text, index in (*vocab.items(), *added.items()):
        # Gemma converters give "\t" the id of its byte, beside it or instead of it.
        byte = f"<0x{ord(text):02X}>" if len(text) == 1 and text < "\x80" else ""
        if byte and (vocab.get(byte) == index or (byte not in vocab and _is_byte_slot(vocab, index, byte))):
            text = byte
        if texts.setdefault(index, text) != text:
            _refuse(path, f"id {index}", "one text", f"{texts[index]!r} and {text!r}")
    count = next(i for i in range(len(texts) + 1) if i not in texts)
    while count and texts[count - 1] not in vocab and texts[count - 1] not in BYTE_PIECES:
        count -= 1
    for text, index in vocab.items():
        if index >= count and text not in added:
            _refuse(path, f"id of {text!r}", f"below {count}, the first id that is missing", index)
    return [texts[i] for i in range(count)]


def _is_byte_slot(vocab: dict[str, int], index: int, byte: str) -> bool:
    """Whether `index` lies where the row of byte pieces has its gap for `byte`."""
    return vocab.get("<0x00>", -1) + int(byte[3:5], 16) == index


def _ranks(merges: list[tuple[str, str]], normal: set[str], path: Path) -> dict[str, int]:
    """Rank of the first merge that makes each piece, after checking that both engines merge alike."""
    ranks: dict[str, int] = {}
    previous = ""
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if piece in normal and piece != previous:
            if piece in ranks:
                _refuse(path, f"model.merges[{rank}]", f"all merges that make {piece!r} together", "apart")
            ranks[piece] = rank
            previous = piece
    listed = set(merges)
    for piece in normal:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            parts = all(len(part) == 1 or part in normal for part in (left, right))
            if parts and (left, right) not in listed:
                _refuse(path, "model.merges", f"every split of {piece!r}", f"no {left!r} + {right!r}")
    return ranks


def _added_tokens(data: dict[str, Any], config: dict[str, Any], path: Path) -> dict[str, int]:
    """Added tokens of tokenizer.json and tokenizer_config.json: text -> id."""
    listed = data.get("added_tokens") or []
    if not isinstance(listed, list) or not all(isinstance(token, dict) for token in listed):
        _refuse(path, "added_tokens", "a list of objects", type(listed).__name__)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        _refuse(
            path.with_name(CONFIG), "added_tokens_decoder", "an object of id: token", type(decoder).__name__
        )
    tokens: dict[str, int] = {}
    for token, index in (
        *((token, token.get("id")) for token in listed),
        *((t, i) for i, t in decoder.items()),
    ):
        if (text := _text(token)) and _is_id(index):
            tokens[text] = int(index)
    if len(tokens) > MAX_ADDED_TOKENS:
        _refuse(path, "added_tokens", f"at most {MAX_ADDED_TOKENS:,}", f"{len(tokens):,}")
    return tokens


def _is_id(index: object) -> bool:
    """An id as a number, or as the digits of a JSON key."""
    digits = str(index) if isinstance(index, int) and index < 1 << 31 else index
    return isinstance(digits, str) and len(digits) <= 10 and digits.isascii() and digits.isdecimal()


def _text(token: Any) -> str | None:
    """The text of a token spelled as a string or as an AddedToken object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _piece_count(path: Path, model: bytes) -> int:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        count = int(processor.GetPieceSize())
        processor.IdToPiece(list(range(count)))
    except RuntimeError as error:
        got = str(error).splitlines()[0] if str(error) else f"{len(model)} bytes of something else"
        raise TokenizerError(path, "file", "a SentencePiece model", got) from None
    except UnicodeDecodeError as error:
        raise TokenizerError(path, "pieces", "UTF-8 text", error) from None
    return count


def _refuse(path: Path, field: str, expected: object, got: object) -> NoReturn:
    raise TokenizerError(path, field, expected, got, ORIGINAL)
