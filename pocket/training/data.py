"""Endless training batches and the held-out sets, by task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import sentencepiece
import torch
from batches import Batch, encode, pack
from examples import Example
from layout import AUDIO_TOKENS
from numpy.typing import NDArray
from pictures import QUESTIONS, image_talk, unseen_images
from speech import SPEECH_TASKS, Clip, cached_samples, key_of, speech_example, unseen_speech
from text_tasks import TEXT_TASKS, unseen_text
from torch import Tensor

from gemma_edge.runtime.families.log_mel import LogMel

ROWS = 8
FRAMES = AUDIO_TOKENS * 16
TRAINING_CLIPS = {
    "speech digits": 1500,
    "speech commands": 1200,
    "translated digits": 1300,
    "translated commands": 1200,
}
# Shares of the tasks among those of their kind, while nothing is known about how well they go.
WEIGHTS = {
    "arithmetic": 4.0,
    "repeat": 2.5,
    "facts": 0.7,
    "stories": 1.0,
    "recall": 1.5,
    "retrieval": 2.0,
    **dict.fromkeys(QUESTIONS, 1.0),
}


@dataclass
class Features:
    """Log-mel of many clips: (clips, FRAMES, bins) f16 and (clips,) frames with sound."""

    values: NDArray[np.float16]
    lengths: NDArray[np.int64]

    def batch(self, rows: list[int], augment: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Features f32 and mask of some clips; a generator flattens bands of bins, and moves levels."""
        values = self.values[rows].astype(np.float32)
        if augment is not None:
            for clip in values:
                clip += np.float32(augment.uniform(-1, 1))
                for _ in range(2):
                    low, width = augment.integers(0, 116), augment.integers(0, 13)
                    clip[:, low : low + width] = clip.mean()
        mask = np.arange(FRAMES) < self.lengths[rows][:, None]
        return torch.from_numpy(values), torch.from_numpy(mask)


def features_of(clips: list[Clip], folder: Path) -> Features:
    """Log-mel of `clips`; samples and features are kept in `folder`."""
    path = folder / f"features-{key_of(clips)}.npz"
    if not path.exists():
        extract = LogMel()
        made = [extract(samples) for samples in cached_samples(clips, folder)]
        values = np.zeros((len(made), FRAMES, extract.feature_size), np.float16)
        lengths = np.zeros(len(made), np.int64)
        for i, (spectrum, mask) in enumerate(made):
            lengths[i] = min(int(mask.sum()), FRAMES)
            values[i, : lengths[i]] = spectrum[: lengths[i]]
        np.savez(path.with_suffix(".partial.npz"), values=values, lengths=lengths)
        path.with_suffix(".partial.npz").rename(path)
    with np.load(path) as data:
        return Features(data["values"], data["lengths"])


class Data:
    """All data of training, drawn from one seed."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, cache: Path, seed: int) -> None:
        self.tokenizer = tokenizer
        self.random = {part: Random(f"{part} {seed}") for part in ("text", "image", "speech", "see", "hear")}
        self.augment = np.random.default_rng(seed)
        self.weights = dict(WEIGHTS)
        random = Random(f"clips {seed}")
        self.spoken = [
            speech_example(random, False, task)
            for task, count in TRAINING_CLIPS.items()
            for _ in range(count)
        ]
        self.features = features_of([example.turns[0].media for example in self.spoken], cache)
        self.clip_of = {id(example.turns[0].media): i for i, example in enumerate(self.spoken)}

    def text(self) -> Batch:
        def endless() -> Iterator[Example]:
            names, weights = list(TEXT_TASKS), [self.weights[task] for task in TEXT_TASKS]
            while True:
                task = self.random["text"].choices(names, weights)[0]
                yield TEXT_TASKS[task](self.random["text"], False)

        return pack((encode(example, self.tokenizer) for example in endless()), ROWS)

    def image(self) -> Batch:
        def endless() -> Iterator[Example]:
            while True:
                yield image_talk(self.random["image"], self.weights)

        return pack((encode(example, self.tokenizer) for example in endless()), ROWS)

    def speech(self) -> Batch:
        def endless() -> Iterator[Example]:
            while True:
                yield self.random["speech"].choice(self.spoken)

        return pack((encode(example, self.tokenizer) for example in endless()), ROWS)

    def heard(self, clips: list[Clip]) -> tuple[Tensor, Tensor]:
        """Features and masks of training clips, changed a little."""
        return self.features.batch([self.clip_of[id(clip)] for clip in clips], self.augment)


@dataclass
class HeldOut:
    """Held-out examples of one task, in batches; features of their clips, if there are any."""

    examples: list[Example]
    batch: Batch
    features: tuple[Tensor, Tensor] | None


def held_out_sets(
    tokenizer: sentencepiece.SentencePieceProcessor, cache: Path, count: int, seed: int = 1
) -> dict[str, HeldOut]:
    """`count` examples of every task, or as many as there are."""
    sets = {}
    for task in (*TEXT_TASKS, *QUESTIONS, *SPEECH_TASKS):
        make = unseen_text if task in TEXT_TASKS else unseen_images if task in QUESTIONS else unseen_speech
        examples = list(make(task, count, seed))
        batch = pack((encode(example, tokenizer) for example in examples), len(examples))
        features = None
        if task in SPEECH_TASKS:
            features = features_of(batch.media, cache).batch(list(range(len(examples))))
        sets[task] = HeldOut(examples, batch, features)
    return sets
