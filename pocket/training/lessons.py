"""What the decoder alone learns further: every task, with encoders that stay as they are, and prose.

Soft tokens of pictures and clips are computed once. Rows are packed from all tasks, in given shares of the
tokens; prose fills what is left of each.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import sentencepiece
import torch
from batches import IGNORED, ROW, Batch, Sequence_, encode, encode_rendered, pack
from data import TRAINING_CLIPS, WEIGHTS, HeldOut, features_of
from examples import Example, Turn
from model import hear, see
from numpy.typing import NDArray
from pictures import QUESTIONS, image_talk, scene, unseen_images
from prose import Chapter
from speech import SPEECH_TASKS, asked_by_verb, key_of, speech_example, unseen_speech
from text_tasks import TEXT_TASKS, unseen_text
from tool_tasks import SHARES as TOOL_SHARES
from tool_tasks import TOOL_TASKS, ToolTalk, rendered, tool_talk, unseen_tools
from torch import Tensor

ROWS = 8
SHARES = {"prose": 0.1, "text": 0.17, "tools": 0.54, "image": 0.095, "speech": 0.095}  # of tokens
# Prose surprises for ever: at its full weight, its gradients drown those of answers that are nearly right.
PROSE_WEIGHT = 0.4
PICTURES, VARIANTS = 8000, 3  # pictures that are drawn, and changed copies of each clip
VERBS = {
    "en": ("speech transcribe", "speech describe"),
    "es": ("speech transcribe", "speech describe", "translated speech"),
}
OWN_QUESTION = {"en": 0.5, "es": 0.45}  # how often a clip is asked about as ever
Array = NDArray[np.float32]


class Prose:
    """Chapters as token ids, and texts cut out of them."""

    def __init__(self, chapters: list[Chapter], tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.bos = tokenizer.bos_id()
        self.texts = [np.array(tokenizer.encode(chapter.text)) for chapter in chapters]
        begins = {
            i for i in range(tokenizer.get_piece_size()) if tokenizer.id_to_piece(i).startswith(("▁", "\n"))
        }
        self.starts = [np.flatnonzero(np.isin(text, list(begins))) for text in self.texts]
        sizes = np.array([len(text) for text in self.texts], float)
        self.random = np.random.default_rng(0)
        self.odds = sizes / sizes.sum()

    def cut(self, count: int) -> Sequence_:
        """A text of `count` tokens, <bos> included."""
        number = int(self.random.choice(len(self.texts), p=self.odds))
        text, starts = self.texts[number], self.starts[number]
        fitting = starts[starts <= len(text) - (count - 1)]
        start = 0 if self.random.random() < 0.02 or not len(fitting) else int(self.random.choice(fitting))
        ids = [self.bos, *text[start : start + count - 1].tolist()]
        return Sequence_(ids, [IGNORED, *ids[1:]], weight=PROSE_WEIGHT)

    def rows(self) -> Iterator[Sequence_]:
        """All texts from their beginning, ROW tokens each."""
        for text in self.texts:
            for start in range(0, len(text), ROW - 1):
                ids = [self.bos, *text[start : start + ROW - 1].tolist()]
                yield Sequence_(ids, [IGNORED, *ids[1:]])


def encode_any(example: Example, tokenizer: sentencepiece.SentencePieceProcessor) -> Sequence_:
    """As the templates write it."""
    if isinstance(example, ToolTalk):
        return encode_rendered(rendered(example), tokenizer)
    return encode(example, tokenizer)


class Lessons:
    """Batches without end, made in a thread of their own."""

    def __init__(
        self,
        model: Any,
        tokenizer: sentencepiece.SentencePieceProcessor,
        chapters: list[Chapter],
        cache: Path,
        seed: str,
    ) -> None:
        self.tokenizer, self.random = tokenizer, Random(seed)
        self.prose = Prose([chapter for chapter in chapters if not chapter.held_out], tokenizer)
        self.prose.random = np.random.default_rng(zlib.crc32(seed.encode()))
        self.base = {**WEIGHTS, **{task: TOOL_SHARES[task.split()[1]] for task in TOOL_TASKS}}
        self.weights = dict(self.base)
        random = Random("pictures to learn from")
        self.pictures = [scene(random, False) for _ in range(PICTURES)]
        self.seen = _kept(cache / f"seen-{PICTURES}.npy", lambda: _seen(model, self.pictures))
        random = Random("clips 2026")
        self.spoken = [
            speech_example(random, False, task)
            for task, count in TRAINING_CLIPS.items()
            for _ in range(count)
        ]
        clips = [example.turns[0].media for example in self.spoken]
        self.heard = _kept(
            cache / f"heard-{key_of(clips)}-{VARIANTS}.npy", lambda: _heard(model, clips, cache)
        )
        self.made: queue.Queue[tuple[Batch, Tensor | None]] = queue.Queue(6)
        self.kinds: dict[str, Callable[[], Sequence_]] = {
            "prose": lambda: self.prose.cut(ROW),
            "text": self._text,
            "tools": self._tools,
            "image": self._image,
            "speech": self._speech,
        }
        self.given = dict.fromkeys(SHARES, 1.0)
        threading.Thread(target=self._work, daemon=True).start()

    def next(self) -> tuple[Batch, Tensor | None]:
        """Rows, and soft tokens of their media in order."""
        return self.made.get()

    def _work(self) -> None:
        while True:
            batch = pack(self._sequences(), ROWS, self.prose.cut)
            soft = [self._soft(place) for place in batch.media]
            self.made.put((batch, torch.from_numpy(np.concatenate(soft)) if soft else None))

    def _sequences(self) -> Iterator[Sequence_]:
        while True:
            kind = min(SHARES, key=lambda name: self.given[name] / SHARES[name])
            sequence = self.kinds[kind]()
            self.given[kind] += len(sequence.ids)
            yield sequence

    def _soft(self, place: tuple[str, int]) -> Array:
        kind, number = place
        if kind == "image":
            return self.seen[number].astype(np.float32)
        return self.heard[self.random.randrange(VARIANTS), number].astype(np.float32)

    def _drawn(self, tasks: list[str]) -> str:
        return self.random.choices(tasks, [self.weights[task] for task in tasks])[0]

    def _text(self) -> Sequence_:
        if self.random.random() < 0.1:  # several questions in turns
            turns: list[Turn] = []
            for _ in range(self.random.randrange(2, 5)):
                example = TEXT_TASKS[self._drawn(["arithmetic", "repeat", "facts", "stories"])](
                    self.random, False
                )
                turns += [*example.turns, Turn("model", example.answer)]
            return encode(Example("talk", tuple(turns[:-1]), turns[-1].text), self.tokenizer)
        return encode(TEXT_TASKS[self._drawn(list(TEXT_TASKS))](self.random, False), self.tokenizer)

    def _tools(self) -> Sequence_:
        return encode_any(tool_talk(self.random, False, self._drawn(TOOL_TASKS)), self.tokenizer)

    def _image(self) -> Sequence_:
        number = self.random.randrange(PICTURES)
        asked = self.random.randrange(1, 5)
        talk = image_talk(self.random, self.weights, asked, self.pictures[number])
        sequence = encode(talk, self.tokenizer)
        sequence.media = [("image", number)]
        return sequence

    def _speech(self) -> Sequence_:
        number = self.random.randrange(len(self.spoken))
        example = self.spoken[number]
        clip = example.turns[0].media
        if self.random.random() > OWN_QUESTION[clip.language]:
            example = asked_by_verb(clip, example.answer, self.random.choice(VERBS[clip.language]))
        sequence = encode(example, self.tokenizer)
        sequence.media = [("speech", number)]
        return sequence


def _kept(path: Path, make: Callable[[], NDArray[np.float16]]) -> NDArray[np.float16]:
    if not path.exists():
        np.save(path.with_suffix(".partial.npy"), make())
        path.with_suffix(".partial.npy").rename(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def _seen(model: Any, pictures: list[Any]) -> NDArray[np.float16]:
    """(pictures, tokens, hidden)"""
    parts = [see(model, pictures[i : i + 64]).half().numpy() for i in range(0, len(pictures), 64)]
    return np.concatenate(parts)


@torch.no_grad()
def _heard(model: Any, clips: list[Any], cache: Path) -> NDArray[np.float16]:
    """(variants, clips, tokens, hidden): the first variant is the clip as it is."""
    features, made = features_of(clips, cache), []
    for variant in range(VARIANTS):
        augment = np.random.default_rng(variant) if variant else None
        parts = [
            hear(model, *features.batch(list(range(i, min(i + 64, len(clips)))), augment))[0].half().numpy()
            for i in range(0, len(clips), 64)
        ]
        made.append(np.concatenate(parts))
    return np.stack(made)


@torch.no_grad()
def lesson_tests(
    model: Any, tokenizer: sentencepiece.SentencePieceProcessor, cache: Path, count: int, seed: int = 1
) -> dict[str, tuple[HeldOut, Tensor | None]]:
    """`count` held-out examples of every task, or as many as there are, and their soft tokens."""
    sets: dict[str, tuple[HeldOut, Tensor | None]] = {}
    for task in (*TEXT_TASKS, *TOOL_TASKS, *QUESTIONS, *SPEECH_TASKS):
        make = (
            unseen_text
            if task in TEXT_TASKS
            else unseen_tools
            if task in TOOL_TASKS
            else unseen_images
            if task in QUESTIONS
            else unseen_speech
        )
        examples: list[Example] = list(make(task, count, seed))
        batch = pack((encode_any(example, tokenizer) for example in examples), len(examples))
        soft = None
        if task in SPEECH_TASKS:
            features = features_of(batch.media, cache).batch(list(range(len(examples))))
            soft = hear(model, *features)[0]
        elif batch.media:
            soft = see(model, batch.media)
        sets[task] = HeldOut(examples, batch, None), soft
    return sets
