"""Transcribes a recording segment by segment, with times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_edge.runtime.media.attachments import Attachment
from gemma_edge.runtime.media.srt import Cue, stitch, timestamp
from gemma_edge.runtime.model import Model

TRANSCRIBE = "Transcribe the following speech segment in its original language."
TRANSLATE = "Translate the following speech segment into {language}. Write the translation alone."
MAX_TOKENS = 512  # of a segment: more than 30 s of quick speech in any script
AHEAD = 8  # segments that are encoded at once: the encoder is loaded once for four minutes


@dataclass(frozen=True)
class Spoken(Cue):
    """The text of a segment; `finish_reason` is that of `Completion`, or "silence"."""

    finish_reason: str


def spoken(
    model: Model,
    path: str | Path,
    prompt: str = TRANSCRIBE,
    *,
    max_tokens: int | None = MAX_TOKENS,
    **options: Any,
) -> Iterator[Spoken]:
    """What is said in a recording, segment by segment as it is read: memory does not grow with its length.

    Args:
        prompt: what the model is asked for each segment.
        options: of `Model.generate`; it is greedy unless they say otherwise.

    Raises:
        As `Reader.segments` and `Model.generate`.
    """
    options = {"temperature": 0.0, "max_tokens": max_tokens, **options}
    for start, end, clip in speech_clips(model, path):
        if clip is None:
            yield Spoken(start, end, "", "silence")
            continue
        answer = model.generate(prompt, attach=[clip], **options)
        yield Spoken(start, end, answer.text.strip(), answer.finish_reason)


def speech_clips(model: Model, path: str | Path) -> Iterator[tuple[float, float, Attachment | None]]:
    """The segments of a recording: where each begins and ends, in seconds, and its sound; None for silence.

    The sound is encoded already: the encoder is loaded once for `AHEAD` segments.

    Raises:
        As `Reader.segments`.
    """
    segments = iter(model.reader.segments(path))
    while group := list(itertools.islice(segments, AHEAD)):
        clips = [
            None
            if segment.silent
            else model.reader.clip(f"{path} {timestamp(segment.start)}", segment.samples)
            for segment in group
        ]
        model.encode([clip for clip in clips if clip is not None])
        for segment, clip in zip(group, clips, strict=True):
            yield segment.start, segment.end, clip


def transcript(path: str | Path, cues: Sequence[Spoken], seconds: float) -> dict[str, Any]:
    """A recording's segments as JSON values.

    Args:
        seconds: the time that transcribing took.

    Returns:
        file, text, segments (start, end, text, finish_reason), duration_s, seconds.
    """
    return {
        "file": str(path),
        "text": stitch(cues),
        "segments": [asdict(cue) for cue in cues],
        "duration_s": cues[-1].end if cues else 0.0,
        "seconds": seconds,
    }
