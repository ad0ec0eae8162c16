"""Where `gemma-edge tune` measures and keeps what it found: this machine, or a device behind ssh.

    python -m gemma_edge.benchmarks.measure.tuning_place ask
    python -m gemma_edge.benchmarks.measure.tuning_place keep SUBJECT '{"threads": 2, ...}'
    python -m gemma_edge.benchmarks.measure.tuning_place forget SUBJECT

is what a device is asked: a setting is kept there, too, where `run` and `serve` look for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from gemma_edge.benchmarks.measure.target import DeviceTarget, LocalTarget, Target
from gemma_edge.devices import Device
from gemma_edge.devices.deployment import environment
from gemma_edge.devices.known_devices import formats_for
from gemma_edge.devices.push import FileDevice
from gemma_edge.devices.script import run_script
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.engines.cores import physical_cores
from gemma_edge.runtime.engines.engine_registry import engine_of
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.typed_json import from_json, to_json
from gemma_edge.runtime.host.cpu_fingerprint import cpu_name
from gemma_edge.runtime.tuned_settings import TunedSettings, check_keeping, forget_tuned, keep_tuned

T = TypeVar("T")

MODULE = "gemma_edge.benchmarks.measure.tuning_place"
TIMEOUT = 120.0


@dataclass(frozen=True)
class Processor:
    """The cores of a machine.

    Attributes:
        threads: that a bundle is loaded with where nobody says how many.
        cores: that programs may use, hardware threads counted each.
        fast: those that are as fast as the fastest.
    """

    name: str
    threads: int
    cores: int
    fast: int


class Place(Protocol):
    """A machine that is tuned.

    Attributes:
        formats: those whose engine runs there.
    """

    formats: tuple[str, ...]

    @property
    def address(self) -> str | None:
        """As `tune --device` names it; None for this machine."""

    def processor(self) -> Processor:
        """What to choose numbers of threads by."""

    def target(self, bundle: Path) -> Target:
        """Where a bundle is measured; it is brought there if need be."""

    def remove(self, bundle: Path) -> None:
        """Removes what `target` brought there."""

    def check(self) -> None:
        """Raises GemmaEdgeError if settings cannot be kept."""

    def keep(self, subject: str, settings: TunedSettings) -> Path:
        """Keeps settings; returns the file here."""

    def forget(self, subject: str) -> bool:
        """Removes settings. Returns whether there were any."""


class ThisMachine:
    """See `Place`."""

    address = None

    def __init__(self) -> None:
        # A parent package is imported by the search, which costs little.
        self.formats = tuple(f for f in ARTIFACT_FORMATS if _installed(engine_of(f).module))

    def processor(self) -> Processor:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Processor(cpu_name(), physical_cores(), allowed, allowed)

    def target(self, bundle: Path) -> Target:
        return LocalTarget(bundle)

    def remove(self, bundle: Path) -> None:
        pass

    def check(self) -> None:
        check_keeping()

    def keep(self, subject: str, settings: TunedSettings) -> Path:
        return keep_tuned(subject, settings)

    def forget(self, subject: str) -> bool:
        return forget_tuned(subject)


class OtherMachine:
    """See `Place`. Raises DeviceError where the device fails."""

    def __init__(self, device: Device) -> None:
        if not isinstance(device, FileDevice) or device.kind != "ssh":
            raise UsageError(f"--device {device.spec}: tune measures on this machine, or behind ssh://")
        self.device, self.address = device, device.spec
        facts = device.facts
        self.formats = formats_for(facts.system, facts.arch, facts.cpu_flags)
        self._pushed: dict[Path, str] = {}

    def processor(self) -> Processor:
        found = self._ask(Processor, "ask")
        facts = self.device.facts
        return Processor(f"{facts.name}, {facts.cpu}", found.threads, found.cores, len(facts.big_cores) or 1)

    def target(self, bundle: Path) -> Target:
        target = DeviceTarget(self.device, bundle)
        self._pushed[bundle] = target.path
        return target

    def remove(self, bundle: Path) -> None:
        if path := self._pushed.pop(bundle, None):
            self.device.remove_pushed(path)

    def check(self) -> None:
        check_keeping()
        self._ask(bool, "check")

    def keep(self, subject: str, settings: TunedSettings) -> Path:
        self._ask(bool, "keep", subject, json.dumps(to_json(settings)))
        return keep_tuned(subject, settings, self.address)

    def forget(self, subject: str) -> bool:
        there = self._ask(bool, "forget", subject)
        return forget_tuned(subject, self.address) or there

    def _ask(self, kind: type[T], *words: str) -> T:
        what = f"{self.address}: {words[0]} settings"
        argv = [self.device.python(), "-m", MODULE, *words]
        run = self.device.run(argv, timeout=TIMEOUT, env=environment(self.device.root), what=what)
        return run.parse(kind, what)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def main(words: Sequence[str]) -> int:
    """Answers what `OtherMachine` asks, on the device, with a line of JSON."""
    here = ThisMachine()
    answer: object = True
    match list(words):
        case ["ask"]:
            answer = to_json(here.processor())
        case ["check"]:
            here.check()
        case ["keep", subject, settings]:
            here.keep(subject, from_json(TunedSettings, json.loads(settings)))
        case ["forget", subject]:
            answer = here.forget(subject)
        case _:
            raise UsageError("expected ask, check, keep or forget")
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
