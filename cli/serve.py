"""Serve a bundle over HTTP: OpenAI's API, and a chat page at `/`.

    gemma-edge serve out/
    gemma-edge serve out/ --host 0.0.0.0 --api-key-file keys.toml
    gemma-edge serve --models bundles/ --memory 2GiB

A checkpoint is served, too: `serve` offers to export it once into the cache folder.
It listens on loopback; any other `--host` needs a key. SIGTERM finishes the running answers, SIGHUP
loads the bundles anew. docs/serving.md has the routes, a systemd unit and the alerts file.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_edge.cli.bench import duration
from gemma_edge.cli.bundle_options import (
    add_loading,
    add_prefix_cache,
    add_words,
    is_bundle,
    loading,
    take_bundle,
)
from gemma_edge.cli.exported_once import add_yes, ready_bundle
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import parse_size

if TYPE_CHECKING:
    from gemma_edge.runtime.server.keyring import Key
    from gemma_edge.runtime.server.model_pool import ServedModel
    from gemma_edge.runtime.server.server_options import Limits, ServerOptions

KEY = "GEMMA_EDGE_API_KEY"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_words(parser)
    add_loading(parser)
    add_prefix_cache(parser)
    add_yes(parser)
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    where.add_argument(
        "--port", type=int, default=8000, metavar="N", help="default: %(default)s; 0: a free one"
    )
    where.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name of this server; repeatable",
    )
    where.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin in; repeatable",
    )
    where.add_argument(
        "--trusted-proxy", action="append", default=[], metavar="ADDRESS", help="believe its X-Forwarded-For"
    )
    who = parser.add_argument_group("who")
    who.add_argument("--api-key", metavar="KEY", help=f"the key that every request needs (default: ${KEY})")
    who.add_argument("--api-key-file", type=Path, metavar="FILE", help="several named keys: a TOML file")
    who.add_argument("--rate", metavar="N/TIME", help="requests of one client: 60/m, 5/10s")
    several = parser.add_argument_group("several models")
    several.add_argument(
        "--models", type=Path, metavar="DIR", help="serve every bundle in a folder by its name"
    )
    several.add_argument(
        "--memory", type=parse_size, metavar="SIZE", help="that loaded models may take together"
    )
    several.add_argument("--name", help="the model's name (default: its folder's)")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--queue", type=int, default=16, metavar="N", help="requests that wait (default: %(default)s)"
    )
    load.add_argument(
        "--snapshots",
        type=parse_size,
        metavar="SIZE",
        help="memory for KV caches of chats that are not being answered (default: the plan's, or 128MiB)",
    )
    load.add_argument(
        "--deadline", type=duration, default=600.0, metavar="TIME", help="of an answer (default: 10m)"
    )
    load.add_argument(
        "--drain", type=duration, default=30.0, metavar="TIME", help="after SIGTERM (default: 30s)"
    )
    load.add_argument(
        "--connections", type=int, default=256, metavar="N", help="at a time (default: %(default)s)"
    )
    limits = parser.add_argument_group("limits of a request")
    limits.add_argument(
        "--max-body", type=parse_size, default=32 << 20, metavar="SIZE", help="default: 32MiB"
    )
    limits.add_argument("--max-messages", type=int, default=50, metavar="N", help="default: %(default)s")
    limits.add_argument(
        "--max-tokens", type=int, metavar="N", help="of an answer (default: what the context holds)"
    )
    limits.add_argument("--max-pixels", type=int, default=16 << 20, metavar="N", help="default: %(default)s")
    limits.add_argument("--max-audio", type=duration, default=600.0, metavar="TIME", help="default: 10m")
    parser.add_argument(
        "--check", action="store_true", help="load the model, listen, and end: try the options"
    )
    watch = parser.add_argument_group("watch")
    watch.add_argument(
        "--access-log", type=Path, metavar="FILE", help="append a line of JSON for each request"
    )
    watch.add_argument("--alerts", type=Path, metavar="FILE", help="thresholds: a TOML file")
    watch.add_argument("--ceiling", type=parse_size, metavar="SIZE", help="of memory (default: the plan's)")
    watch.add_argument(
        "--degraded-after",
        type=duration,
        default=5.0,
        metavar="TIME",
        help="an answer that is slow (default: 5s)",
    )


def run(args: argparse.Namespace) -> int:
    """The verb.

    Raises:
        UsageError, ConfigError: an option, or a file that one names, is wrong.
        BundleError: a bundle is damaged.
        GemmaEdgeError: the address is in use.
    """
    from gemma_edge.runtime.server.alerts import read_alerts
    from gemma_edge.runtime.server.application import Application
    from gemma_edge.runtime.server.exchange import AccessLog
    from gemma_edge.runtime.server.keyring import Keyring
    from gemma_edge.runtime.server.serving import Serving, run_server

    options, keys = _options(args), _keys(args)
    find_models = partial(_models, args, _bundle(args))
    alerts = read_alerts(args.alerts) if args.alerts else None
    log = AccessLog(args.access_log) if args.access_log else None
    _log_to_stderr()
    pool = _pool(args, find_models())
    app = Application(pool, options, keyring=Keyring(keys), access_log=log, alerts=alerts)
    serving = Serving(app, find_models, partial(_tell_ready, len(pool.models)))
    serving.should_exit = args.check
    run_server(serving)
    return 0


def _bundle(args: argparse.Namespace) -> str | None:
    """The one bundle, which `args.name` names then; None with --models."""
    from gemma_edge.runtime.server.serving import served_name

    if args.models is None:
        bundle, words = take_bundle(args)
        if words:
            raise UsageError(
                f"unexpected argument {words[0]!r}: one bundle is served; --models serves several"
            )
        if args.memory is not None:
            raise UsageError("--memory is for --models")
        args.name = args.name or served_name(Path(bundle).resolve())  # a checkpoint's own, too
        return ready_bundle(bundle, args.yes)
    if args.words or args.model or args.name:
        raise UsageError("--models DIR serves the bundles in DIR: leave the bundle and --name out")
    if not args.models.is_dir():
        raise UsageError(f"--models {args.models}: no such folder")
    return None


def _models(args: argparse.Namespace, bundle: str | None) -> Mapping[str, ServedModel]:
    """The bundles as they are now, checked."""
    from gemma_edge.runtime.server.model_pool import ServedModel
    from gemma_edge.runtime.server.serving import find_bundles

    if bundle is not None:
        return {args.name: ServedModel.of(args.name, Path(bundle), args.context)}
    found = find_bundles(args.models, lambda path: is_bundle(str(path)))
    if not found:
        raise UsageError(f"--models {args.models}: it has no bundle in it")
    return {name: ServedModel.of(name, path, args.context) for name, path in found.items()}


def _pool(args: argparse.Namespace, models: Mapping[str, ServedModel]) -> Any:
    from gemma_edge.runtime.host.available_memory import available_memory
    from gemma_edge.runtime.model import Model
    from gemma_edge.runtime.request_queue import RequestQueue
    from gemma_edge.runtime.server.model_pool import ModelPool

    budget = (args.memory or available_memory()) if args.models else None
    how = {**loading(args, snapshots=args.snapshots), "log": logging.getLogger("gemma_edge.server").debug}

    def load(path: Path) -> Model:
        return Model.load(path, queue=RequestQueue(args.queue, shared=True), **how)

    return ModelPool(models, load, budget=budget, most_waiting=args.queue)


def _options(args: argparse.Namespace) -> ServerOptions:
    from gemma_edge.runtime.server.keyring import parse_rate
    from gemma_edge.runtime.server.server_options import ServerOptions

    for flag in ("connections", "max_messages", "max_pixels", "max_tokens"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be 1 or more, not {value}")
    if args.queue < 0 or not 0 <= args.port < 65_536:
        raise UsageError("--queue must be 0 or more, and --port 0 to 65535")
    return ServerOptions(
        host=args.host,
        port=args.port,
        hosts=tuple(args.allow_host),
        origins=tuple(args.cors),
        rate=parse_rate(args.rate) if args.rate else None,
        queue=args.queue,
        deadline_s=args.deadline,
        drain_s=args.drain,
        degraded_after_s=args.degraded_after,
        ceiling=args.ceiling,
        connections=args.connections,
        trusted_proxies=tuple(args.trusted_proxy),
        limits=_limits(args),
    )


def _limits(args: argparse.Namespace) -> Limits:
    from gemma_edge.runtime.server.server_options import Limits

    return Limits(
        body_bytes=args.max_body,
        messages=args.max_messages,
        image_pixels=args.max_pixels,
        audio_seconds=args.max_audio,
        max_tokens=args.max_tokens,
    )


def _keys(args: argparse.Namespace) -> list[Key]:
    """The keys; there must be one for an address that others reach."""
    from gemma_edge.runtime.server.gate import is_loopback
    from gemma_edge.runtime.server.keyring import one_key, read_keys

    secret = args.api_key or os.environ.get(KEY)
    keys = read_keys(args.api_key_file) if args.api_key_file else []
    if secret:
        keys.append(one_key(secret))
    if not keys and not is_loopback(args.host):
        raise UsageError(f"--host {args.host} is reached by others: give --api-key or --api-key-file")
    return keys


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("gemma_edge.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("gemma_edge.server").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def _tell_ready(models: int, url: str) -> None:
    tell(f"{url} answers with {models} {'model' if models == 1 else 'models'}; Ctrl-C ends")
