"""Put a bundle and what runs it on a board, behind ssh.

    gemma-edge deploy out/ ssh://pi@raspberrypi     bundle, runtime, and the command gemma-edge there
    gemma-edge deploy out/ ssh://pi --serve         and `gemma-edge serve`, now and at every start
    gemma-edge deploy ssh://pi --runtime-only       the command alone, with every engine
    gemma-edge deploy ssh://pi --uninstall          take all of it away again

The board needs Python 3.11 or newer and no network. What it has already is not sent again, and an interrupted
transfer is continued. At the end `doctor` runs there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.cli.device_answers import Printed, say, sending
from gemma_edge.cli.variables import MODEL
from gemma_edge.devices.deployment import (
    Deployed,
    deploy,
    environment,
    launcher_path,
    needs_of,
    serve,
    tidy,
    uninstall,
)
from gemma_edge.devices.live_run import LiveRun
from gemma_edge.devices.open_device import open_device
from gemma_edge.devices.push import FileDevice
from gemma_edge.devices.ssh import SCHEME, SshDevice
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge deploy`."""
    parser.usage = "%(prog)s [options] [BUNDLE] ssh://[USER@]HOST[:PORT][/FOLDER]"
    parser.add_argument("words", nargs="+", metavar="BUNDLE", help="the bundle, then the device")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--serve", action="store_true", help="serve the bundle there, now and at every start")
    what.add_argument(
        "--runtime-only", action="store_true", help="send no bundle; one that is named says which engine"
    )
    what.add_argument("--uninstall", action="store_true", help="remove what earlier calls put there")
    parser.add_argument(
        "--extra",
        action="append",
        default=[],
        metavar="NAME",
        help="install this extra there, too, such as structured or video; repeatable",
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="of --serve (default: 8000)")


def run(args: argparse.Namespace) -> int:
    """The verb.

    Raises:
        UsageError: the arguments name no device, or no bundle where one is needed.
        DeviceError: the device is gone, cannot run gemma-edge, or is full.
        BundleError: the bundle is damaged.
    """
    spec, bundle = _target(args)
    opened = None if bundle is None else Bundle.open(bundle)
    needs = needs_of(opened, [*args.extra, *(["serve"] if args.serve else [])])
    needs.requirements()  # an unknown extra is an error before anything connects
    if not 0 < args.port < 65_536:
        raise UsageError(f"--port must be 1 to 65535, not {args.port}")
    with open_device(spec) as device:
        assert isinstance(device, SshDevice)  # of such a name
        if args.uninstall:
            uninstall(device)
            tell(f"{spec}: nothing of gemma-edge is left there.")
            return 0
        runtime, model = _Sent("runtime"), _Sent("bundle")
        kept = None if args.runtime_only or opened is None else opened.path
        found = deploy(device, kept, needs, on_runtime=runtime, on_bundle=model)
        tell(f"{spec}: sent {runtime}, {model}.")
        if args.serve:
            tell(f"The service is {serve(device, ['--port', str(args.port)])}.")
        for each in tidy(device, found):
            tell(f"Another environment of gemma-edge stays there, for `bench` or another computer: {each}")
            tell(f"If nobody uses it, remove it there: rm -r {shlex.quote(each)}")
        _doctor(device, found)
        _tell_how(device, found, args.port if args.serve else None)
    return 0


def _target(args: argparse.Namespace) -> tuple[str, Path | None]:
    """The device and the bundle."""
    *bundles, spec = args.words
    if not spec.startswith(SCHEME) or len(bundles) > 1:
        raise UsageError(f"expected [BUNDLE] {SCHEME}HOST, got {shlex.join(args.words)}")
    if not bundles and not (args.runtime_only or args.uninstall):
        raise UsageError(f"name the bundle: gemma-edge deploy BUNDLE {spec}, or --runtime-only")
    if bundles and args.uninstall:
        raise UsageError(f"--uninstall removes all bundles: leave {bundles[0]} out")
    return spec, Path(bundles[0]) if bundles else None


@dataclass
class _Sent:
    """Counts what a transfer sent beyond what was there, and shows it on a terminal."""

    what: str
    first: int | None = None
    total: int = 0

    def __post_init__(self) -> None:
        self._show = sending(self.what)

    def __call__(self, done: int, total: int) -> None:
        self.first = done if self.first is None else self.first
        self.total = total
        self._show(done, total)

    def __str__(self) -> str:
        sent = 0 if self.first is None else self.total - self.first
        return f"{format_size(sent)} of {self.what}" if sent else f"no {self.what}, it was there"


def _doctor(device: FileDevice, found: Deployed) -> None:
    """Runs `gemma-edge doctor` there, which shows that the command starts."""
    launcher = launcher_path(device)
    argv = [launcher, "doctor", *([] if found.model is None else [found.model])]
    with LiveRun(device, argv, env=environment(device.root), on_error_line=say, what="doctor") as live:
        write = Printed(sys.stderr)
        for piece in live.pieces():
            write(piece)


def _tell_how(device: FileDevice, found: Deployed, port: int | None) -> None:
    """What to type next."""
    ask = "BUNDLE PROMPT" if found.model is None else '"Why is the sky blue?"'
    tell(f"Ask from here:  gemma-edge run --device {shlex.quote(device.spec)} {ask}")
    tell(f"Ask there:      gemma-edge run {ask}    (~/.local/bin is in the PATH of a new login)")
    if found.model is not None:
        tell(f"${MODEL} there is {found.model} unless it is set.")
    if port is not None:
        tell(f"The service listens on port {port} of the device itself: ssh -L {port}:127.0.0.1:{port} HOST")
        tell("It starts with the device once you allow it there: sudo loginctl enable-linger $USER")
