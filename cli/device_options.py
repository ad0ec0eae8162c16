"""The argument `--device`, of `doctor` and of the verbs that answer."""

from __future__ import annotations

import argparse

LOCAL = "local"
SHAPES = "ssh://[USER@]HOST[:PORT][/FOLDER], adb or adb:SERIAL"


def add_device(parser: argparse.ArgumentParser, text: str = "answer on this device") -> None:
    """Adds --device; `text` says what it does to the verb."""
    parser.add_argument("--device", metavar="DEVICE", help=f"{text}: {SHAPES}")


def is_elsewhere(args: argparse.Namespace) -> bool:
    """Whether the verb is to answer on another machine."""
    return args.device is not None and args.device != LOCAL
