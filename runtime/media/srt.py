"""Transcripts of segments as one text, or as SubRip or WebVTT subtitles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cue:
    """A text and its place in a recording, in seconds from the beginning."""

    start: float
    end: float
    text: str

    @property
    def line(self) -> str:
        """The text in one line, with single spaces."""
        return " ".join(self.text.split())


def stitch(cues: Iterable[Cue]) -> str:
    """The texts of segments that follow each other, as one: a space between them, none where one is empty."""
    return " ".join(cue.line for cue in cues if cue.line)


def srt(cues: Iterable[Cue]) -> str:
    """Subtitles in the SubRip format, numbered from 1. Cues without text are left out.

    A text becomes one line: an empty one within it would end its cue.
    """
    spoken = (cue for cue in cues if cue.line)
    return "\n".join(subtitle(cue, number) for number, cue in enumerate(spoken, 1))


def subtitle(cue: Cue, number: int) -> str:
    """One cue of `srt`, numbered from 1."""
    return f"{number}\n{timestamp(cue.start)} --> {timestamp(cue.end)}\n{cue.line}\n"


def vtt(cues: Iterable[Cue]) -> str:
    """The same in the WebVTT format: times with a point, and no markup."""
    cues = [cue for cue in cues if cue.line]
    escape = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    times = [f"{timestamp(cue.start)} --> {timestamp(cue.end)}".replace(",", ".") for cue in cues]
    shown = [f"{time}\n{cue.line.translate(escape)}\n" for time, cue in zip(times, cues, strict=True)]
    return "\n".join(["WEBVTT\n", *shown])


def timestamp(seconds: float) -> str:
    """3661.5 -> "01:01:01,500"."""
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"


def clock(seconds: float) -> str:
    """For people: 61.5 -> "1:01", 3661.5 -> "1:01:01"."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"
