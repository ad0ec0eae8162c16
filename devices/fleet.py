"""Several devices side by side: a TOML file names them, one thread works on each.

[[device]]
name = "pi5"
spec = "ssh://pi@raspberrypi"
bundle = "out"              # instead of the one on the command line
cool_to_c = 50              # any other key is for the work to read
"""

from __future__ import annotations

import threading
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from gemma_edge.devices.base import Device
from gemma_edge.devices.open_device import open_device
from gemma_edge.runtime.errors import FileError, GemmaEdgeError

Result = TypeVar("Result")


class FleetError(FileError):
    """A fleet file cannot be used."""

    exit_code = 2


@dataclass(frozen=True)
class Member:
    """One device of a fleet: its name in results, its spec, and what else its table says."""

    name: str
    spec: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """The end of one member's work: a result or an error."""

    member: Member
    result: Result | None
    error: GemmaEdgeError | None


def read_fleet(path: Path) -> list[Member]:
    """The members in the file's order.

    Raises:
        FleetError: the file is malformed, names no device, or two devices have one name or spec.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("device")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FleetError(path, "file", "a TOML file", error) from None
    if not isinstance(tables, list) or not tables:
        raise FleetError(path, "device", "tables [[device]]", "none" if tables is None else tables)
    members: list[Member] = []
    for number, table in enumerate(tables, 1):
        field = f"device {number}"
        if not isinstance(table, dict) or not isinstance(table.get("spec"), str):
            raise FleetError(path, f"{field}: spec", "a string", table)
        name = table.get("name", table["spec"])
        if not isinstance(name, str):
            raise FleetError(path, f"{field}: name", "a string", name)
        options = {key: value for key, value in table.items() if key not in ("name", "spec")}
        for other in members:
            if other.name == name or other.spec == table["spec"]:
                raise FleetError(path, field, "a name and a spec of its own", f"those of {other.name}")
        members.append(Member(name, table["spec"], options))
    return members


def run_fleet(
    members: Sequence[Member],
    work: Callable[[Device, Member], Result],
    *,
    done: Callable[[Outcome[Result]], None] | None = None,
) -> list[Outcome[Result]]:
    """Works on all devices at the same time; returns when all have ended, in the members' order.

    A device that fails does not hold up the others: its outcome has the error. Ctrl-C ends what runs on each
    of them, and is raised when all have let go.

    Args:
        done: called as soon as a member has ended, one call at a time: to keep the results so far.
    """
    opened: dict[str, Device] = {}
    lock, stopped = threading.Lock(), threading.Event()

    def one(member: Member) -> Outcome[Result]:
        try:
            with open_device(member.spec) as device:
                with lock:
                    opened[member.name] = device
                    if stopped.is_set():
                        device.close()
                outcome = Outcome(member, work(device, member), None)
        except GemmaEdgeError as error:
            outcome = Outcome[Result](member, None, error)
        if done is not None and not stopped.is_set():
            with lock:
                done(outcome)
        return outcome

    with ThreadPoolExecutor(max(1, len(members)), thread_name_prefix="fleet") as pool:
        futures = [pool.submit(one, member) for member in members]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stopped.set()
            with lock:
                for device in opened.values():
                    device.close()
            raise
