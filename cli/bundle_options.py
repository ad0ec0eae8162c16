"""Arguments shared by the verbs that run a bundle: the bundle, how to load it, the attachments.

The bundle is the first argument, or `-m BUNDLE` anywhere, or $GEMMA_EDGE_MODEL. With `-m`, no
argument names the bundle. If only the environment names a bundle, the first argument counts as a
bundle if it is one, or if the verb has no other use for it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from pathlib import Path
from typing import Any

from gemma_edge.cli.variables import MODEL
from gemma_edge.runtime.artifacts.artifact_formats import FILE_SUFFIXES
from gemma_edge.runtime.artifacts.manifest import MANIFEST
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import UsageError


def add_words(parser: argparse.ArgumentParser, name: str = "", text: str = "") -> None:
    """The positional arguments: the bundle, then those that `name` shows and `text` explains."""
    parser.usage = f"%(prog)s [options] [BUNDLE] {name}".rstrip()
    parser.add_argument(
        "words",
        nargs="*",
        metavar="BUNDLE",
        help=f"the bundle, unless -m or ${MODEL} names it{text and '; ' + text}",
    )
    parser.add_argument("-m", "--model", metavar="BUNDLE", help=f"the bundle (default: ${MODEL})")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How the bundle is loaded."""
    parser.add_argument(
        "--threads", type=int, metavar="N", help="worker threads (default: tuned, or one per core)"
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="tokens of a prefill call (default: tuned, or the bundle's)"
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens of KV cache (default: the bundle's)")
    parser.add_argument(
        "--keep-encoders",
        action="store_true",
        help="keep encoders in memory between prompts: faster later prompts, higher peak",
    )


def add_prefix_cache(parser: argparse.ArgumentParser) -> None:
    """Whether prefixes and encoded attachments are kept on disk."""
    parser.add_argument(
        "--prefix-cache",
        metavar="SIZE",
        help="keep what was computed of system messages and documents on disk, such as 1GiB at most, for the "
        "next run (default: keep nothing)",
    )
    parser.add_argument(
        "--attachment-cache",
        metavar="SIZE",
        help="keep encoded images and recordings on disk, such as 256MiB at most: the same file is then not "
        "encoded again (default: keep nothing)",
    )


def add_attachments(parser: argparse.ArgumentParser) -> None:
    """Files that go into a prompt."""
    parser.add_argument(
        "-a",
        "--attach",
        action="append",
        default=[],
        metavar="FILE",
        help="attach an image, a recording or a video before the text; repeatable",
    )
    add_video(parser)


def add_video(parser: argparse.ArgumentParser) -> None:
    """The share of a prompt that a video may take."""
    parser.add_argument(
        "--video-tokens",
        type=int,
        metavar="N",
        help="most tokens for a video (default: half of the context, at most 2048)",
    )


def take_bundle(args: argparse.Namespace, others: int | None = None) -> tuple[str, list[str]]:
    """The bundle's path and the remaining arguments.

    Args:
        others: how many arguments the verb takes at most beside the bundle; None for any number.

    Raises:
        UsageError: nothing names a bundle, or there are more arguments.
    """
    words = list(args.words)
    named = args.model or os.environ.get(MODEL)
    first = bool(words) and (is_bundle(words[0]) or (others is not None and len(words) > others))
    if args.model or (named and not first):
        bundle = str(named)
    elif words and (is_bundle(words[0]) or not Path(words[0]).is_file()):
        bundle, *words = words
    else:
        got = f"{words[0]} is not a bundle: " if words else ""
        raise UsageError(f"{got}name one as the first argument, with -m BUNDLE, or in ${MODEL}")
    if others is not None and len(words) > others:
        raise UsageError(f"unexpected argument {words[others]!r}")
    return bundle, words


def take_bundles(args: argparse.Namespace) -> list[Path]:
    """The paths of one bundle or several; their names tell them apart in results.

    Raises:
        UsageError: nothing names a bundle, or two have the same name.
    """
    words = list(args.words)
    if len(words) < 2 and not (words and args.model):
        return [Path(take_bundle(args, 0)[0])]
    bundles = [Path(word) for word in ([args.model] if args.model else []) + words]
    if len({bundle.resolve().name for bundle in bundles}) < len(bundles):
        raise UsageError("several bundles of one name: their results could not be told apart")
    return bundles


def is_bundle(path: str) -> bool:
    """Whether a path looks like a bundle; `Bundle.open` checks it."""
    with contextlib.suppress(OSError):  # a prompt may be too long for a name
        return Path(path, MANIFEST).is_file() or (Path(path).suffix in FILE_SUFFIXES and Path(path).is_file())
    return False


def loading(args: argparse.Namespace, snapshots: int | None = 0) -> dict[str, Any]:
    """Keyword arguments of `Model.load` from those of `add_loading` and, where used, `add_video`.

    Args:
        snapshots: as of `Model.load`; a verb with one conversation needs none.
    """
    return {
        "threads": args.threads,
        "context": args.context,
        "chunk": args.chunk,
        "keep_encoders": args.keep_encoders,
        "video_tokens": getattr(args, "video_tokens", None),
        "snapshots": snapshots,
        "prefix_cache": getattr(args, "prefix_cache", None),
        "attachment_cache": getattr(args, "attachment_cache", None),
        "log": tell,
    }


def add_max_kl(parser: argparse.ArgumentParser) -> None:
    """The argument that makes a bundle's distance from its checkpoint a reason to refuse it."""
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="refuse a bundle with a mean KL divergence from the checkpoint above this (default: none)",
    )


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """The argument that chooses what images are scaled to."""
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="pixels of a side that images are scaled to: 256, 512 or 768 for published checkpoints; fewer "
        "are encoded sooner and show less (default: the checkpoint's own)",
    )


def check_max_kl(value: float | None) -> None:
    """Raises UsageError for a bound that nothing could be held to."""
    if value is not None and not 0 <= value < math.inf:
        raise UsageError(f"--max-kl must be a number of 0 or more, not {value}")
