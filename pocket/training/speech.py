"""Spoken digits and commands, from espeak-ng: transcribed, and translated from Spanish.

Several accents, voices, speeds, pitches and levels of noise. What is held out are voices: no training clip is
spoken by one of them. Clips are made once, and kept as features in a folder outside the repository.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from examples import Example, ask
from layout import AUDIO_TOKENS, TOKEN_SECONDS
from numpy.typing import NDArray

from gemma_edge.runtime import transcription
from gemma_edge.runtime.description import QUESTIONS as DESCRIBE
from gemma_edge.runtime.media.recordings import SAMPLE_RATE, read_audio

Array = NDArray[np.float32]

MAX_SAMPLES = int(AUDIO_TOKENS * TOKEN_SECONDS * SAMPLE_RATE)
TRANSCRIBE, TRANSLATE = "Transcribe the speech.", "Translate the speech to English."
ACCENTS = {"en": ("en-us", "en-gb", "en-gb-scotland", "en-029", "en-gb-x-rp"), "es": ("es", "es-419")}
VOICES = "m1 m2 m4 m5 m6 m7 f1 f2 f4 f5 Andy Annie ed linda steph belinda david john robert zac".split()
TEST_VOICES = "m3 f3 Michael Alicia".split()

DIGITS = {
    "en": "zero one two three four five six seven eight nine".split(),
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve".split(),
}
VERBS = {"turn on": "enciende", "turn off": "apaga", "open": "abre", "close": "cierra"}
THINGS = {
    "light": "la luz",
    "radio": "la radio",
    "door": "la puerta",
    "window": "la ventana",
    "oven": "el horno",
    "fan": "el ventilador",
}
SHORT = {
    "stop": "para",
    "help": "ayuda",
    "go left": "a la izquierda",
    "go right": "a la derecha",
    "good morning": "buenos días",
    "good night": "buenas noches",
    "thank you": "gracias",
}
COMMANDS = {
    **{
        f"{verb} the {thing}": f"{verbo} {cosa}"
        for verb, verbo in VERBS.items()
        for thing, cosa in THINGS.items()
    },
    **SHORT,
}


@dataclass(frozen=True)
class Clip:
    """A spoken phrase.

    Attributes:
        said: the words, in `language`.
        voice: espeak-ng's name of it.
        speed, pitch: espeak-ng's words a minute, and its pitch from 0 to 99.
        gain: the loudest sample.
        noise: dB below the speech; 0 for none.
        seed: of the noise, and of the silence before and after.
    """

    language: str
    said: str
    voice: str
    speed: int
    pitch: int
    gain: float
    noise: int
    seed: int

    def samples(self) -> Array:
        """(n,) at 16 kHz, at most MAX_SAMPLES."""
        random = np.random.default_rng(self.seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "said.wav"
            command = [
                "espeak-ng",
                "-v",
                self.voice,
                "-s",
                str(self.speed),
                "-p",
                str(self.pitch),
                "-w",
                str(path),
            ]
            subprocess.run([*command, self.said], check=True, capture_output=True)
            said = np.concatenate([segment.samples for segment in read_audio(path)])
        loud = np.flatnonzero(np.abs(said) > 0.01 * np.abs(said).max())
        said = said[loud[0] : loud[-1] + 1]
        before, after = random.integers(800, 3200, 2)
        said = np.pad(said * np.float32(self.gain / np.abs(said).max()), (before, after))[:MAX_SAMPLES]
        if self.noise:
            level = np.sqrt(np.mean(np.square(said))) * 10 ** (-self.noise / 20)
            said = said + np.float32(level) * random.standard_normal(len(said), dtype=np.float32)
        return np.clip(said, -1, 1).astype(np.float32)


def clip(random: Random, test: bool, language: str, said: str) -> Clip:
    """`said` by a voice of training, or by a held-out one."""
    voice = random.choice(TEST_VOICES if test else VOICES)
    return Clip(
        language,
        said,
        f"{random.choice(ACCENTS[language])}+{voice}",
        random.randrange(130, 181, 5),
        random.randrange(35, 66),
        round(random.uniform(0.2, 0.9), 2),
        random.choice((0, 0, 30, 20, 15)),
        random.randrange(1 << 30),
    )


def digits(random: Random, test: bool, language: str) -> Example:
    """Two to four digits; the answer has them as figures."""
    figures = [random.randrange(10) for _ in range(random.randrange(2, 5))]
    said = " ".join(DIGITS[language][figure] for figure in figures)
    answer = "".join(map(str, figures))
    return _about(clip(random, test, language, said), "digits", answer)


def command(random: Random, test: bool, language: str) -> Example:
    """A command; the answer is in English."""
    english = random.choice(list(COMMANDS))
    said = COMMANDS[english] if language == "es" else english
    return _about(clip(random, test, language, said), "commands", english)


def _about(spoken: Clip, topic: str, answer: str) -> Example:
    if spoken.language == "en":
        return ask(f"speech {topic}", TRANSCRIBE, answer, spoken)
    return ask(f"translated {topic}", TRANSLATE, answer, spoken)


def asked_by_verb(spoken: Clip, answer: str, task: str) -> Example:
    """What the verbs `transcribe`, `translate` and `describe` ask of a clip.

    Args:
        answer: what is said, in English; digits are figures.
    """
    figures = answer.isdigit()
    if task == "speech transcribe":
        return ask(task, transcription.TRANSCRIBE, answer if figures else spoken.said, spoken)
    if task == "translated speech":
        return ask(task, transcription.TRANSLATE.format(language="English"), answer, spoken)
    voice = "A voice" if spoken.language == "en" else "A Spanish voice"
    said = answer if figures else spoken.said
    return ask("speech describe", DESCRIBE["audio"], f"{voice} says: {said}", spoken)


def _by_verb(task: str) -> Callable[[Random, bool, str], Example]:
    def make(random: Random, test: bool, language: str) -> Example:
        if language == "any":
            language = random.choice(("en", "es"))
        example = random.choice((digits, command))(random, test, language)
        return asked_by_verb(example.turns[0].media, example.answer, task)

    return make


SPEECH_TASKS: dict[str, tuple[Callable[[Random, bool, str], Example], str]] = {
    "speech digits": (digits, "en"),
    "speech commands": (command, "en"),
    "translated digits": (digits, "es"),
    "translated commands": (command, "es"),
    "speech transcribe": (_by_verb("speech transcribe"), "any"),
    "speech describe": (_by_verb("speech describe"), "any"),
    "translated speech": (_by_verb("translated speech"), "es"),
}


def speech_example(random: Random, test: bool, task: str) -> Example:
    """A new clip of one of SPEECH_TASKS, with its question."""
    make, language = SPEECH_TASKS[task]
    return make(random, test, language)


def unseen_speech(task: str, count: int, seed: int) -> Iterator[Example]:
    """`count` examples in held-out voices."""
    random = Random(f"test {task} {seed}")
    for _ in range(count):
        yield speech_example(random, True, task)


def key_of(clips: list[Clip]) -> str:
    """A name for these clips and no others."""
    return hashlib.sha256(repr(clips).encode()).hexdigest()[:16]


def cached_samples(clips: list[Clip], folder: Path, threads: int = 12) -> list[Array]:
    """The samples of `clips`, made once and kept in `folder`; espeak-ng waits more than it computes."""
    path = folder / f"clips-{key_of(clips)}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(threads) as pool:
            made = list(pool.map(Clip.samples, clips))
        packed = np.concatenate([(samples * 32767).astype(np.int16) for samples in made])
        temporary = path.with_suffix(".partial.npz")
        np.savez(temporary, samples=packed, lengths=[len(samples) for samples in made])
        temporary.rename(path)
    with np.load(path) as data:
        samples = data["samples"].astype(np.float32) / 32767
        return np.split(samples, np.cumsum(data["lengths"])[:-1])
