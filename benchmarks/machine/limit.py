"""Runs a command under a memory limit where it is started: what `cgroup.run_limited` does, on a device.

    python -m gemma_edge.benchmarks.machine.limit BYTES SECONDS COMMAND...
    python -m gemma_edge.benchmarks.machine.limit --probe

prints one JSON line: the run with its output, or with --probe what can be enforced there and why not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from gemma_edge.benchmarks.machine.cgroup import LimitedRun, mechanism, run_limited
from gemma_edge.benchmarks.machine.child import ChildError, ChildRun
from gemma_edge.benchmarks.machine.memory import PeakMemory
from gemma_edge.benchmarks.script import run_script
from gemma_edge.runtime.errors import DeviceError, UsageError

MODULE = "gemma_edge.benchmarks.machine.limit"


def limit_argv(python: str, limit: int, timeout: float, argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` under a limit there."""
    return [python, "-m", MODULE, str(limit), str(timeout), *argv]


def probe_argv(python: str) -> list[str]:
    """The command line that asks whether a limit can be enforced there."""
    return [python, "-m", MODULE, "--probe"]


def parse_probe(run: ChildRun) -> tuple[bool, str]:
    """Whether a limit can be enforced, and the reason if not."""
    said = _answer(run)
    return said.get("mechanism") not in (None, "none"), str(said.get("reason"))


def parse_limited(run: ChildRun) -> LimitedRun:
    """The run as it was there.

    Raises:
        ChildError, DeviceError: there was none.
    """
    said = _answer(run)
    try:
        peak = PeakMemory(**said.pop("peak"))
        return LimitedRun(**said, peak=peak)
    except (KeyError, TypeError) as error:
        raise DeviceError(f"the limited run printed no result ({error!r})") from None


def _answer(run: ChildRun) -> dict[str, Any]:
    if run.exit_code:
        raise ChildError("the run under a limit", run)
    try:
        said = run.answer()
        if not isinstance(said, dict):
            raise ValueError("no object")
        return said
    except ValueError:
        raise DeviceError(f"the run under a limit printed no result: {run.stdout[-200:]!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--probe"]:
        found = mechanism()
        print(json.dumps({"mechanism": found.name, "reason": found.reason}), flush=True)
        return 0
    if len(args) < 3:
        raise UsageError(f"usage: python -m {MODULE} BYTES SECONDS COMMAND..., or --probe")
    try:
        limit, timeout = int(args[0]), float(args[1])
    except ValueError:
        raise UsageError(f"{args[0]} {args[1]}: expected bytes and seconds") from None
    run = run_limited(args[2:], limit, timeout=timeout)
    print(json.dumps({**vars(run), "peak": run.peak.to_dict()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
