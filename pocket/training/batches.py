"""Examples as arrays: token ids, labels, and packed rows of several conversations each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sentencepiece
from examples import Example
from layout import AUDIO, AUDIO_TOKENS, END_OF_AUDIO, END_OF_IMAGE, IMAGE, IMAGE_GRID, WINDOW
from numpy.typing import NDArray
from pictures import Scene

IGNORED = -100  # a label that no loss is taken of
ROW = 384  # tokens of a row
FILLER = 1  # <eos>
LEAST_REST = 24  # tokens at the end of a row that are worth a text


@dataclass
class Sequence_:
    """One conversation: ids, labels of the model's own tokens, media in order, and how much it counts."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    media: list[Any] = field(default_factory=list)
    weight: float = 1.0


def encode(example: Example, tokenizer: sentencepiece.SentencePieceProcessor) -> Sequence_:
    """As the chat template and the processor of the checkpoint write it, the answer included."""
    out = Sequence_()

    def add(ids: Sequence[int], learned: bool = False) -> None:
        out.ids.extend(ids)
        out.labels.extend(ids if learned else [IGNORED] * len(ids))

    add([tokenizer.bos_id()])
    for turn in (*example.turns, None):
        if turn is None or turn.role == "model":
            answer = example.answer if turn is None else turn.text
            add(tokenizer.encode("<start_of_turn>model\n"))
            add(tokenizer.encode(answer + "<end_of_turn>"), learned=True)
            add(tokenizer.encode("\n"))
        elif turn.media is None:
            add(tokenizer.encode(f"<start_of_turn>user\n{turn.text}<end_of_turn>\n"))
        else:
            picture = isinstance(turn.media, Scene)
            kind = "image" if picture else "audio"
            soft = (
                [IMAGE] * IMAGE_GRID**2 + [END_OF_IMAGE]
                if picture
                else [AUDIO] * AUDIO_TOKENS + [END_OF_AUDIO]
            )
            add(tokenizer.encode(f"<start_of_turn>user\n\n\n<start_of_{kind}>"))
            add(soft)
            add(tokenizer.encode(f"\n\n{turn.text}<end_of_turn>\n"))
            out.media.append(turn.media)
    return out


TURN = re.compile(r"(?<=<start_of_turn>model\n)(.*?<end_of_turn>)", re.DOTALL)


def encode_rendered(text: str, tokenizer: sentencepiece.SentencePieceProcessor) -> Sequence_:
    """A conversation as the chat template wrote it; all turns of the model's are learned."""
    out = Sequence_([tokenizer.bos_id()], [IGNORED])
    for number, part in enumerate(TURN.split(text.removeprefix("<bos>"))):
        ids = tokenizer.encode(part)
        out.ids.extend(ids)
        out.labels.extend(ids if number % 2 else [IGNORED] * len(ids))
    return out


@dataclass
class Batch:
    """Packed rows.

    Attributes:
        ids, labels, positions, segments: (rows, ROW) i64; a label belongs to the token after its place.
        media: in the order of their soft tokens.
        weights: (rows, ROW) f32, how much each sequence counts.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    media: list[Any]
    weights: NDArray[np.float32]

    @property
    def used(self) -> float:
        """The part of all places that holds a token."""
        return float(np.mean(self.segments > 0))


def pack(sequences: Iterable[Sequence_], rows: int, rest: Callable[[int], Sequence_] | None = None) -> Batch:
    """Fills at most `rows` rows from `sequences`, each into the first with room, until one fits nowhere.

    Args:
        rest: makes a sequence of a given length, for what is left of a row.
    """
    filled: list[list[Sequence_]] = [[] for _ in range(rows)]
    lengths = [0] * rows
    for sequence in sequences:
        if len(sequence.ids) > ROW:
            continue
        row = next((i for i in range(rows) if lengths[i] + len(sequence.ids) <= ROW), None)
        if row is None:
            break
        filled[row].append(sequence)
        lengths[row] += len(sequence.ids)
    if rest is not None:
        for row, length in enumerate(lengths):
            if ROW - length >= LEAST_REST:
                filled[row].append(rest(ROW - length))
                lengths[row] = ROW
    rows = sum(length > 0 for length in lengths)
    batch = Batch(
        # The embedding of <pad> is 0, and AltUp's magnitude has no gradient there: nothing must be <pad>.
        np.full((rows, ROW), FILLER, np.int64),
        np.full((rows, ROW), IGNORED, np.int64),
        np.zeros((rows, ROW), np.int64),
        np.zeros((rows, ROW), np.int64),
        [],
        np.ones((rows, ROW), np.float32),
    )
    for i, sequences_of_row in enumerate(filled[:rows]):
        start = 0
        for number, sequence in enumerate(sequences_of_row, 1):
            count = len(sequence.ids)
            place = slice(start, start + count)
            batch.ids[i, place] = sequence.ids
            batch.labels[i, start : start + count - 1] = sequence.labels[1:]
            batch.positions[i, place] = np.arange(count)
            batch.segments[i, place] = number
            batch.weights[i, place] = sequence.weight
            batch.media.extend(sequence.media)
            start += count
    return batch


def masks(segments: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """What each token sees, (rows, 1, ROW, ROW): its own conversation, up to itself, perhaps a window."""
    place = np.arange(segments.shape[1])
    distance = place[:, None] - place[None, :]
    own = segments[:, :, None] == segments[:, None, :]
    full = (own & (distance >= 0))[:, None]
    return {"full_attention": full, "sliding_attention": full & (distance < WINDOW)}
