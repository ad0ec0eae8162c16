"""The argument `--device` of the verbs that answer, and of `doctor`."""

from __future__ import annotations

import argparse

LOCAL = "local"
SHAPES = "ssh://[USER@]HOST[:PORT][/FOLDER], adb or adb:SERIAL"


def add_device(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --device; `text` says what it does to the verb."""
    parser.add_argument("--device", metavar="DEVICE", help=f"{text}: {SHAPES}")
