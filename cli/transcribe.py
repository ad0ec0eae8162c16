"""Transcribe recordings or videos.

A recording of any length is cut at pauses into segments of at most 30 s, and each segment becomes a
line with its times. `--srt` prints subtitles, `--text` one text, `--json` one object per recording.
Silence is left out.
"""

from __future__ import annotations

import argparse
import json
import time

from gemma_edge.cli.answering_model import answering_model
from gemma_edge.cli.bundle_options import add_loading, add_words, take_bundle
from gemma_edge.cli.device_options import add_device, is_elsewhere
from gemma_edge.cli.exported_once import add_yes
from gemma_edge.runtime.console import for_stdout, tell
from gemma_edge.runtime.errors import MediaError, UsageError
from gemma_edge.runtime.media.attachments import kind_of
from gemma_edge.runtime.media.srt import stitch, subtitle, timestamp
from gemma_edge.runtime.transcription import MAX_TOKENS, TRANSCRIBE, Spoken, spoken, transcript


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_speech_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """The verb. Raises what `Model.load`, `Reader.segments` and `Model.generate` raise."""
    return speech_verb(args, args.prompt or TRANSCRIBE)


def add_speech_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `transcribe` and `translate` share."""
    add_words(parser, "FILE...", "then recordings or videos")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--srt", action="store_true", help="print SubRip subtitles")
    forms.add_argument("--text", action="store_true", help="print the text alone, without times")
    forms.add_argument("--json", action="store_true", help="print one JSON object per recording")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="ask this of each segment instead of the default question"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help="most tokens per segment (default: %(default)s)",
    )
    parser.add_argument("-u", "--usage", action="store_true", help="report time and speed on stderr")
    add_loading(parser)
    add_yes(parser)
    add_device(parser)


def speech_verb(args: argparse.Namespace, prompt: str) -> int:
    """Prints what `spoken` gives of every file, in the form that is asked for."""
    if is_elsewhere(args):
        from gemma_edge.cli.device_answers import answer_there, local_bundle  # a board needs none of it

        local, files = local_bundle(args)
        _check(files)
        args.prompt = prompt  # translate's, too: there it is a transcription that is asked for otherwise
        return answer_there(args, "transcribe", add_speech_arguments, [], bundle=local, files=files)
    bundle, files = take_bundle(args)
    _check(files)
    with answering_model(args, bundle, defer=True) as model:
        for file in files:
            started = time.perf_counter()
            cues: list[Spoken] = []
            for cue in spoken(model, file, prompt, max_tokens=args.max_tokens):
                cues.append(cue)
                if args.srt and cue.line:
                    print(for_stdout(subtitle(cue, sum(1 for each in cues if each.line))), flush=True)
                elif cue.line and not (args.text or args.json):
                    line = f"[{timestamp(cue.start)} --> {timestamp(cue.end)}] {cue.line}"
                    print(for_stdout(line), flush=True)
            seconds, duration = time.perf_counter() - started, cues[-1].end if cues else 0.0
            if args.json:
                print(json.dumps(transcript(file, cues, seconds), ensure_ascii=False), flush=True)
            elif args.text:
                print(for_stdout(stitch(cues)), flush=True)
            if not any(cue.line for cue in cues):
                tell(f"{file}: no speech found")
            if args.usage:
                pace = f", {duration / seconds:.2f} times as fast as it was spoken" if seconds else ""
                tell(f"{file}: {duration:.1f} s in {len(cues)} segments took {seconds:.1f} s{pace}")
    return 0


def _check(files: list[str]) -> None:
    """Before a model is loaded."""
    if not files:
        raise UsageError("no recording: name a recording or a video")
    for file in files:
        if kind_of(file) == "image":
            raise MediaError(file, "file", "a recording or a video", "an image")
