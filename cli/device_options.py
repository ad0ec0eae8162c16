"""The argument `--device`, of `doctor` and of the verbs that answer."""

from __future__ import annotations

import argparse

LOCAL = "local"
ADB = "adb"
BEHIND_SSH = "ssh://[USER@]HOST[:PORT][/FOLDER]"
SHAPES = f"{BEHIND_SSH}, adb or adb:SERIAL"


def add_device(parser: argparse.ArgumentParser, text: str = "answer on this device") -> None:
    """Adds --device; `text` says what it does to the verb."""
    parser.add_argument("--device", metavar="DEVICE", help=f"{text}: {SHAPES}")


def is_native(args: argparse.Namespace) -> bool:
    """Whether the native runner of an Android device is to answer what this command asks."""
    return args.device is not None and args.device.partition(":")[0] == ADB


def is_elsewhere(args: argparse.Namespace) -> bool:
    """Whether the verb is to run on another machine, behind ssh."""
    return args.device not in (None, LOCAL) and not is_native(args)


def is_tunable(device: str) -> bool:
    """Whether `gemma-edge tune --device` takes a name: this machine, or one behind ssh."""
    return device == LOCAL or device.startswith("ssh://")
