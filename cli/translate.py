"""Translate the speech of recordings or videos.

Prints a line for each segment of at most 30 s, as `gemma-edge transcribe` does, or uses `--srt`,
`--text` or `--json`.
"""

from __future__ import annotations

import argparse

from gemma_edge.cli.transcribe import add_speech_arguments, speech_verb
from gemma_edge.runtime.transcription import TRANSLATE


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_speech_arguments(parser)
    parser.add_argument(
        "--to", default="English", metavar="LANGUAGE", help="the language to translate to (default: English)"
    )


def run(args: argparse.Namespace) -> int:
    """The verb. Raises as `transcribe`."""
    return speech_verb(args, args.prompt or TRANSLATE.format(language=args.to))
