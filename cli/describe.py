"""Describe pictures, recordings or videos.

Prints one answer per file, with the file's name if there are several. With `--json`, prints one
object per file.
"""

from __future__ import annotations

import argparse
import json

from gemma_edge.cli.answering_model import answering_model
from gemma_edge.cli.bundle_options import add_loading, add_video, add_words, take_bundle
from gemma_edge.cli.device_options import add_device, is_elsewhere
from gemma_edge.cli.exported_once import add_yes
from gemma_edge.cli.run import print_answer
from gemma_edge.runtime.description import MAX_TOKENS, describe
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.media.attachments import kind_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_words(parser, "FILE...", "then images, recordings or videos")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this instead of the default question")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print each answer as one JSON object")
    parser.add_argument("-u", "--usage", action="store_true", help="report tokens and speed on stderr")
    add_video(parser)
    add_loading(parser)
    add_yes(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """The verb. Raises what `Model.load` and `Model.generate` raise, or `answer_there`."""
    if is_elsewhere(args):
        from gemma_edge.cli.device_answers import answer_there, local_bundle  # a board needs none of it

        local, files = local_bundle(args)
        _check(files)
        return answer_there(args, "describe", configure, [], bundle=local, files=files)
    bundle, files = take_bundle(args)
    _check(files)
    with answering_model(args, bundle, defer=True) as model:
        for file in files:
            stream = describe(model, file, args.prompt, max_tokens=args.max_tokens)
            if args.json:
                for _ in stream:
                    pass
                print(
                    json.dumps({"file": file, **stream.completion.to_dict()}, ensure_ascii=False), flush=True
                )
                continue
            if len(files) > 1:
                print(f"{file}: ", end="", flush=True)
            print_answer(stream, usage=args.usage)
    return 0


def _check(files: list[str]) -> None:
    """Before a model is loaded."""
    if not files:
        raise UsageError("name an image, a recording or a video")
    for file in files:
        kind_of(file)
