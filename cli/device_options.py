"""The argument `--device`, of `doctor` and of the verbs that answer."""

from __future__ import annotations

import argparse

LOCAL = "local"
BEHIND_SSH = "ssh://[USER@]HOST[:PORT][/FOLDER]"
SHAPES = f"{BEHIND_SSH}, adb or adb:SERIAL"


def add_device(
    parser: argparse.ArgumentParser, text: str = "answer on this device", shapes: str = BEHIND_SSH
) -> None:
    """Adds --device; `text` says what it does to the verb, `shapes` how a device is named."""
    parser.add_argument("--device", metavar="DEVICE", help=f"{text}: {shapes}")


def is_elsewhere(args: argparse.Namespace) -> bool:
    """Whether the verb is to answer on another machine."""
    return args.device is not None and args.device != LOCAL
