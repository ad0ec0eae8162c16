"""The model that a verb asks: on this machine, or with `--device adb` on an Android device."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gemma_edge.cli.bundle_options import loading
from gemma_edge.cli.device_options import is_native
from gemma_edge.cli.exported_once import ready_bundle
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model import Model


@contextmanager
def answering_model(
    args: argparse.Namespace, bundle: str, options: Mapping[str, Any] | None = None, *, defer: bool = False
) -> Iterator[Model]:
    """Loads the bundle, and lets a device go at the end.

    Args:
        bundle: its path, or what `ready_bundle` takes in its place.
        options: of `Model.generate`, as far as they are known: a device may not have all.
        defer: as `Model.load` takes it.

    Raises:
        UsageError: an option that cannot be had there.
        As `ready_bundle`, `Model.load`, `open_device` and `NativeModel.connect`.
    """
    path = ready_bundle(bundle, args.yes)
    if not is_native(args):
        yield Model.load(path, defer_decoder=defer, **loading(args))
        return
    from gemma_edge.cli.device_answers import sending  # a board needs none of it
    from gemma_edge.devices.native_model import NativeModel
    from gemma_edge.devices.open_device import open_device
    from gemma_edge.devices.push import FileDevice

    if getattr(args, "attachment_cache", None):
        raise UsageError(f"--attachment-cache: {args.device} keeps no attachments: leave it out")
    if getattr(args, "prefix_cache", None):
        raise UsageError(f"--prefix-cache: {args.device} keeps no prefixes: leave it out")
    model = NativeModel.load(path, defer_decoder=True, **loading(args))
    with open_device(args.device) as device, model:
        assert isinstance(device, FileDevice)  # of such a name
        model.connect(device, threads=args.threads, sending=sending)
        model.check(options or {})
        yield model
