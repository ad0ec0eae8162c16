"""Runs a command under a memory limit on a device, as `cgroup.run_limited` does here.

    python -m gemma_edge.devices.machine.limit BYTES SECONDS COMMAND...
    python -m gemma_edge.devices.machine.limit --probe

prints one JSON line: a `LimitedRun`, or a `LimitProbe` with --probe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_edge.devices.machine.cgroup import mechanism, run_limited
from gemma_edge.devices.script import run_script
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.typed_json import to_json

MODULE = "gemma_edge.devices.machine.limit"


def limit_argv(python: str, limit: int, timeout: float, argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` under a limit and prints a `LimitedRun`."""
    return [python, "-m", MODULE, str(limit), str(timeout), *argv]


def probe_argv(python: str) -> list[str]:
    """The command line that prints a `LimitProbe`."""
    return [python, "-m", MODULE, "--probe"]


@dataclass(frozen=True)
class LimitProbe:
    """How a limit can be enforced; `reason` says why not if `mechanism` is "none"."""

    mechanism: str
    reason: str


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--probe"]:
        found = mechanism()
        print(json.dumps(to_json(LimitProbe(found.name, found.reason))), flush=True)
        return 0
    if len(args) < 3:
        raise UsageError(f"usage: python -m {MODULE} BYTES SECONDS COMMAND..., or --probe")
    try:
        limit, timeout = int(args[0]), float(args[1])
    except ValueError:
        raise UsageError(f"{args[0]} {args[1]}: expected bytes and seconds") from None
    run = run_limited(args[2:], limit, timeout=timeout)
    print(json.dumps(to_json(run)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
