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
from pictures import QUESTIONS, image_example, test_images
from speech import SPEECH_TASKS, Clip, cached_samples, speech_example, test_speech
from text_tasks import TEXT_TASKS, test_examples
from torch import Tensor

from gemma_edge.runtime.log_mel import log_mel

ROWS = 16
FRAMES = AUDIO_TOKENS * 16
TRAINING_CLIPS = {"speech digits": 1500, "speech commands": 1200, "translated digits": 1300, "translated commands": 1200}
# Shares of the tasks while nothing is known about how well they go.
WEIGHTS = {"arithmetic": 3.0, "facts": 0.7, "stories": 0.7, "tools": 2.0, "recall": 1.5, "retrieval": 2.0}


@dataclass
class Features:
    """Log-mel of many clips: (clips, FRAMES, bins) f16 and (clips,) frames with sound."""

    values: NDArray[np.float16]
    lengths: NDArray[np.int64]

    def batch(self, rows: list[int], augment: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Features f32 and mask of some clips; with a generator, bands of bins are flattened and levels moved."""
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
    """Log-mel of `clips`; their samples are kept in `folder`."""
    made = [log_mel(samples) for samples in cached_samples(clips, folder)]
    values = np.zeros((len(made), FRAMES, 128), np.float16)
    lengths = np.zeros(len(made), np.int64)
    for i, (spectrum, mask) in enumerate(made):
        lengths[i] = min(int(mask.sum()), FRAMES)
        values[i, : lengths[i]] = spectrum[: lengths[i]]
    return Features(values, lengths)


class Data:
    """All data of training, drawn from one seed."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, cache: Path, seed: int) -> None:
        self.tokenizer = tokenizer
        self.random = {part: Random(f"{part} {seed}") for part in ("text", "image", "speech", "see", "hear")}
        self.augment = np.random.default_rng(seed)
        self.weights = dict(WEIGHTS)
        random = Random(f"clips {seed}")
        self.spoken = [
            speech_example(random, False, task) for task, count in TRAINING_CLIPS.items() for _ in range(count)
        ]
        self.features = features_of([example.turns[0].media for example in self.spoken], cache)
        self.clip_of = {id(example.turns[0].media): i for i, example in enumerate(self.spoken)}

    def text(self) -> Batch:
        def endless() -> Iterator[Example]:
            names, weights = list(self.weights), list(self.weights.values())
            while True:
                task = self.random["text"].choices(names, weights)[0]
                yield TEXT_TASKS[task](self.random["text"], False)

        return pack((encode(example, self.tokenizer) for example in endless()), ROWS)

    def image(self) -> Batch:
        def endless() -> Iterator[Example]:
            while True:
                yield image_example(self.random["image"], False, self.random["image"].choice(list(QUESTIONS)))

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
    """`count` examples of every task."""
    sets = {}
    for task in (*TEXT_TASKS, *QUESTIONS, *SPEECH_TASKS):
        make = test_examples if task in TEXT_TASKS else test_images if task in QUESTIONS else test_speech
        examples = list(make(task, count, seed))
        batch = pack((encode(example, tokenizer) for example in examples), count)
        features = None
        if task in SPEECH_TASKS:
            features = features_of(batch.media, cache).batch(list(range(count)))
        sets[task] = HeldOut(examples, batch, features)
    return sets
