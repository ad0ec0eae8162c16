"""More merges for a tokenizer: its own stay first, so texts that it knew are cut much as before."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import sentencepiece

from gemma_edge.export.checkpoint.sentencepiece_model import (
    SPACE,
    Piece,
    PieceKind,
    build_model,
    sentencepiece_proto,
)

# What a piece may lie in: a word with the space before it, or a run of signs, spaces between them included.
WORD = re.compile(rf"{SPACE}?[A-Za-z_]+|[^A-Za-z0-9_\n{SPACE}]+(?:{SPACE}[^A-Za-z0-9_\n{SPACE}]+)*")


def extended(model: bytes, texts: Sequence[tuple[Iterable[str], int]]) -> bytes:
    """A tokenizer with further merges, behind its own and before its letters; its last two pieces stay last.

    Args:
        texts: in turn, texts and how many merges to learn from them.
    """
    spm = sentencepiece_proto()
    proto = spm.ModelProto()
    proto.ParseFromString(model)
    pieces = [Piece(p.piece, PieceKind(p.type), p.score) for p in proto.pieces]
    first_letter = next(i for i, p in enumerate(pieces) if p.kind == PieceKind.NORMAL and len(p.text) == 1)
    head, letters, tail = pieces[:first_letter], pieces[first_letter:-2], pieces[-2:]
    for found, count in texts:
        head += _merges(_built(head, letters, tail), found, count, -head[-1].score + 1)
    return _built(head, letters, tail)


def _built(head: Sequence[Piece], letters: Sequence[Piece], tail: Sequence[Piece]) -> bytes:
    after = -head[-1].score + 1
    moved = [piece._replace(score=-(after + rank)) for rank, piece in enumerate(letters)]
    return build_model([*head, *moved, *tail])


def _merges(model: bytes, texts: Iterable[str], count: int, rank: float) -> list[Piece]:
    """The next merges of byte-pair encoding, most frequent first."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    words = Counter(word for text in texts for word in WORD.findall(text.replace(" ", SPACE)))
    cut = {word: tokenizer.encode(word.replace(SPACE, " "), out_type=str) for word in words}
    made: list[Piece] = []
    while len(made) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in cut.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            raise ValueError(f"the texts give {len(made)} merges only, not {count}")
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        made.append(Piece(left + right, PieceKind.NORMAL, -(rank + len(made))))
        for word, parts in cut.items():
            if left + right in word:
                cut[word] = _joined(parts, left, right)
    return made


def _joined(parts: list[str], left: str, right: str) -> list[str]:
    out: list[str] = []
    for part in parts:
        if part == right and out and out[-1] == left:
            out[-1] = left + right
        else:
            out.append(part)
    return out
