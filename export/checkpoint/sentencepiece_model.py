"""SentencePiece models: the container, and the vocabulary of synthetic checkpoints.

Gemma's tokenizer is BPE with byte fallback, no dummy prefix, and spaces escaped as "▁". The encoder merges
the adjacent pair whose concatenation has the highest score, so a vocabulary with scores is a whole
tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

SPACE = "▁"
BYTE_PIECES = tuple(f"<0x{value:02X}>" for value in range(256))
GEMMA_PIECES = 262_144
GEMMA_IMAGE_START = 255_999  # <start_of_image>; <start_of_audio> follows it


class PieceKind(IntEnum):
    """SentencePiece's piece types."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its position."""

    text: str
    kind: PieceKind = PieceKind.NORMAL
    score: float = 0.0  # merge priority: higher merges first


def sentencepiece_proto() -> Any:
    """The generated module of SentencePiece's messages, whose attributes no type checker sees.

    Imported on demand: only a conversion and a .litertlm need protobuf.
    """
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def build_model(
    pieces: Sequence[Piece], *, pad: str = "<pad>", eos: str = "<eos>", bos: str = "<bos>", unk: str = "<unk>"
) -> bytes:
    """A serialized ModelProto of Gemma's form.

    Args:
        pieces: the vocabulary in order of id; all 256 `BYTE_PIECES` and one UNKNOWN piece among it.
        pad, eos, bos, unk: texts of the special pieces; one that is not in `pieces` gets id -1.
    """
    spm = sentencepiece_proto()
    model = spm.ModelProto()
    for piece in pieces:
        model.pieces.add(piece=piece.text, score=piece.score, type=int(piece.kind))
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    trainer = model.trainer_spec
    trainer.model_type = spm.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    trainer.allow_whitespace_only_pieces = True
    for name, text in (("pad", pad), ("eos", eos), ("bos", bos), ("unk", unk)):
        setattr(trainer, f"{name}_id", ids.get(text, -1))
        setattr(trainer, f"{name}_piece", text)
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return bytes(model.SerializeToString())


# The synthetic vocabulary. ------------------------------------------------------------------------

ASCII = tuple(map(chr, range(0x21, 0x7F)))
# Each is reached by merging earlier ones: "th", "the", "▁the".
FREQUENT = """
    th in er on an re the ing ed or at es is it al ar st ▁the and ▁a ▁s ▁w ▁c ▁p ▁f ▁b ▁m ▁d ▁o ▁and
    ▁to ▁of ▁in ou le ve om el ro ic en ly ion ent se ch ll ha me
""".split()
HTML = """
    table caption thead tbody tfoot tr th td ul ol li h1 h2 h3 h4 h5 h6 blockquote p b i u s sub sup
    code
""".split()
# Characters of the scripts that get a piece of their own: Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari,
# Thai, punctuation, kana, CJK, Hangul, emoji.
SCRIPTS = (
    *(
        (0xA1, 0x250),
        (0x370, 0x378),
        (0x38E, 0x3A2),
        (0x3A3, 0x530),
        (0x5D0, 0x5EB),
        (0x620, 0x64B),
        (0x904, 0x93A),
    ),
    *(
        (0xE01, 0xE3B),
        (0x2010, 0x2028),
        (0x20A0, 0x20C0),
        (0x2190, 0x2200),
        (0x3041, 0x3097),
        (0x30A1, 0x3100),
    ),
    *((0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0x1F300, 0x1F650)),
)


def synthetic_pieces(count: int) -> list[Piece]:
    """A vocabulary of `count` pieces with Gemma's special ids, bytes, characters and real-looking merges.

    pad 0, eos 1, bos 2, unk 3, <mask> 4, <start_of_turn> 105, <end_of_turn> 106; the last two pieces (at
    `GEMMA_PIECES`, ids 255,999 and 256,000) are <start_of_image> and <start_of_audio>.

    Raises:
        ValueError: `count` has no room for the special pieces, bytes and ASCII.
    """
    large = count >= 65_536
    head = [
        Piece("<pad>", PieceKind.CONTROL),
        Piece("<eos>", PieceKind.CONTROL),
        Piece("<bos>", PieceKind.CONTROL),
    ]
    head += [Piece("<unk>", PieceKind.UNKNOWN)]
    head += _user_defined(["<mask>", "[multimodal]", *(f"<unused{i}>" for i in range(99))])
    head += _user_defined(["<start_of_turn>", "<end_of_turn>"])
    head += _user_defined("\n" * n for n in range(1, 32 if large else 5))
    head += _user_defined(SPACE * n for n in range(2, 32 if large else 5))
    if large:
        tags = [f"<{tag}>" for tag in HTML] + [f"</{tag}>" for tag in HTML]
        tabs = ["\t" * n for n in range(2, 238 - len(head) - len(tags) + 2)]
        head += _user_defined(tags + tabs)
    head += [Piece(text, PieceKind.BYTE) for text in BYTE_PIECES]
    reserved = GEMMA_PIECES - GEMMA_IMAGE_START if count == GEMMA_PIECES else 2
    tail = ["<start_of_image>", "<start_of_audio>", *(f"<unused{i + 99}>" for i in range(reserved - 2))]
    singles = [SPACE, *ASCII, *(chr(i) for low, high in SCRIPTS for i in range(low, high) if large)]
    room = count - len(head) - len(singles) - len(tail)
    if room < 0:
        raise ValueError(f"a synthetic vocabulary needs {count - room} pieces or more, not {count}")
    merged = itertools.islice(dict.fromkeys(itertools.chain(FREQUENT, _syllables())), room)
    normal = [Piece(text, PieceKind.NORMAL, -float(rank)) for rank, text in enumerate([*merged, *singles])]
    return [*head, *normal, *_user_defined(tail)]


def _user_defined(texts: Iterable[str]) -> list[Piece]:
    return [Piece(text, PieceKind.USER_DEFINED) for text in texts]


def _syllables() -> Iterator[str]:
    """Some 650,000 pronounceable strings, short ones first."""
    onsets = [*"bcdfghjklmnprstvwz", "ch", "sh"]
    open_ = [onset + vowel for onset in onsets for vowel in "aeiou"]
    closed = [syllable + coda for syllable in open_ for coda in "nrstlmk"]
    yield from open_
    yield from closed
    yield from (SPACE + syllable for syllable in open_ + closed)
    yield from (first + second for first in open_ + closed for second in open_ + closed)
