"""Write down what is said in recordings, or in videos, in another language.

As `gemma-edge transcribe`: a line for each segment of at most 30 s, or `--srt`, `--text`, `--json`.
"""

from __future__ import annotations

import argparse

from gemma_edge.runtime.verbs.transcribe import add_speech_arguments, speech_verb

PROMPT = "Translate the following speech segment into {language}. Write the translation alone."


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_speech_arguments(parser)
    parser.add_argument("--to", default="English", metavar="LANGUAGE", help="default: English")


def run(args: argparse.Namespace) -> int:
    """The verb. Raises as `transcribe`."""
    return speech_verb(args, args.prompt or PROMPT.format(language=args.to))
