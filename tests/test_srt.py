"""Transcripts of segments as one text and as subtitles."""

from __future__ import annotations

import pytest

from gemma_edge.runtime.media.srt import Cue, srt, stitch, timestamp

CUES = [
    Cue(0.0, 22.2, " Good morning.\n\nToday: "),
    Cue(22.2, 30.0, " \n"),
    Cue(30.0, 3661.0004, "the\tweather."),
]


def test_stitched() -> None:
    assert stitch(CUES) == "Good morning. Today: the weather."
    assert stitch([]) == ""


def test_subtitles() -> None:
    assert srt(CUES) == (
        "1\n00:00:00,000 --> 00:00:22,200\nGood morning. Today:\n"
        "\n"
        "2\n00:00:30,000 --> 01:01:01,000\nthe weather.\n"
    )
    assert srt([]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00,000"),
        (0.0004, "00:00:00,000"),
        (59.9996, "00:01:00,000"),
        (3599.999, "00:59:59,999"),
        (10800.5, "03:00:00,500"),
        (360_000, "100:00:00,000"),
    ],
)
def test_timestamp(seconds: float, text: str) -> None:
    assert timestamp(seconds) == text
