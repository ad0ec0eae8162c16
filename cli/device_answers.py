"""`--device ssh://` of the verbs that answer: files are sent, the command runs there, it streams here.

The command line that a device gets is made anew from the parsed arguments, so that nothing but known options
with their values reaches it.
"""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from gemma_edge.cli.bundle_options import is_bundle
from gemma_edge.cli.device_options import SHAPES
from gemma_edge.cli.variables import MODEL
from gemma_edge.devices.deployment import deployed_or_refuse, environment, needs_of
from gemma_edge.devices.install import install
from gemma_edge.devices.live_run import LiveRun
from gemma_edge.devices.open_device import open_device
from gemma_edge.devices.push import FileDevice
from gemma_edge.devices.run_folder import RunFolder
from gemma_edge.devices.ssh import SCHEME
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.console import ProgressLine, tell, without_controls
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_size

# Arguments that name files here; the others travel as they are.
_FILES = ("attach", "tools", "json_schema", "grammar")
_OURS = ("device", "words", "model", "help", "yes")


@dataclass(frozen=True)
class Place:
    """Where a verb answers: a device, the folder of this run, and the command there up to the verb."""

    device: FileDevice
    folder: RunFolder
    command: tuple[str, ...]
    bundle: str  # there

    def live(self, argv: Sequence[str], stdin: str, what: str) -> LiveRun:
        """The command with further words; what it says on stderr is said here."""
        return LiveRun(
            self.device,
            [*self.command, *argv],
            folder=self.folder.cwd,
            stdin=stdin,
            env=environment(self.device.root),
            on_error_line=say,
            what=what,
        )


@contextmanager
def place(args: argparse.Namespace, bundle: str | None) -> Iterator[Place]:
    """Connects, sends the bundle if one is named, and installs the runtime where it is missing.

    Raises:
        UsageError, DeviceError: as `open_device` and `install`.
        BundleError: the bundle is damaged.
    """
    opened = None if bundle is None else Bundle.open(bundle)
    if not args.device.startswith(SCHEME):
        raise UsageError(f"--device {args.device}: expected {SHAPES}")
    with open_device(args.device) as device:
        assert isinstance(device, FileDevice)
        if opened is None:
            found = deployed_or_refuse(device)
            needs, there = found.needs, str(found.model)
        else:
            needs = needs_of(opened)
        python = install(device, needs, sending("runtime"))
        if opened is not None:
            there = device.push(opened.path, progress=sending(opened.path.name))
        with RunFolder(device) as folder:
            yield Place(device, folder, (python, "-m", "gemma_edge"), there)


def sending(what: str) -> Callable[[int, int], None]:
    """Shows how far a transfer is, on a terminal."""
    line = ProgressLine()

    def show(done: int, total: int) -> None:
        line.show(f"{what}: {format_size(done)} of {format_size(total)}" if done < total else "")

    return show


def local_bundle(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The bundle here that is to be sent, or None for the one that is deployed there; the other arguments.

    Raises:
        UsageError: a folder that is no bundle.
    """
    words = list(args.words)
    if args.model:
        return str(args.model), words
    if words and is_bundle(words[0]):
        return words[0], words[1:]
    if words and os.path.isdir(words[0]):
        raise UsageError(f"{words[0]} is not a bundle: gemma-edge export makes one")
    named = os.environ.get(MODEL)
    return (named if named and is_bundle(named) else None), words


def answer_there(
    args: argparse.Namespace,
    verb: str,
    configure: Callable[[argparse.ArgumentParser], None],
    words: Sequence[str],
    *,
    bundle: str | None,
    files: Sequence[str] = (),
    stdin: bytes | None = None,
) -> int:
    """Runs a verb on `args.device`, prints what it prints, and returns its exit code.

    Args:
        words: the positional arguments after the bundle.
        files: further ones, which name files here.
        stdin: what the verb reads there.

    Raises:
        UsageError, DeviceError, BundleError: as `place`.
    """
    with place(args, bundle) as there:
        options = options_of(args, configure, there.folder)
        sent = [there.folder.send(each) for each in files]
        source = "/dev/null" if stdin is None else there.folder.write("stdin", stdin)
        argv = [verb, *options, "--", there.bundle, *words, *sent]
        with there.live(argv, source, f"gemma-edge {verb}") as live:
            write = Printed()
            for piece in live.pieces():
                write(piece)
            write.end()
        return live.exit_code or 0


class Printed:
    """Bytes from a device on a stream here; a terminal gets no control characters."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, piece: bytes) -> None:
        self.text(self._decoder.decode(piece))

    def text(self, text: str) -> None:
        shown = without_controls(text) if self._stream.isatty() else text
        print(shown, end="", flush=True, file=self._stream)

    def end(self) -> None:
        self.text(self._decoder.decode(b"", True))


def options_of(
    args: argparse.Namespace, configure: Callable[[argparse.ArgumentParser], None], folder: RunFolder
) -> list[str]:
    """The options of a verb as words, but for those of this end; the files that they name are sent."""
    parser = argparse.ArgumentParser(add_help=False)
    configure(parser)
    words = [f"--{name}" for name in ("quiet", "verbose") if getattr(args, name, False)]
    values: Mapping[str, object] = vars(args)
    for action in parser._actions:
        value = values.get(action.dest)
        if action.dest in _OURS or value is None or value == action.default or not action.option_strings:
            continue
        name = max(action.option_strings, key=len)
        if action.nargs == 0:
            words.append(name)
            continue
        for each in value if isinstance(value, list) else [value]:
            words.append(f"{name}={folder.send(str(each)) if action.dest in _FILES else each}")
    return words


def say(line: str) -> None:
    """A line of a device's stderr on this one."""
    tell(without_controls(line) if sys.stderr.isatty() else line, always=True)
