"""`Device`: the protocol of a machine that runs measured programs; `open_device(spec)` returns one.

    with open_device("ssh://pi@raspberrypi") as device:
        bundle = device.push(Path("out"))
        run = device.run([device.python(), "-m", "timeit"], timeout=600)

Every failure of a device raises a `DeviceError` (exit code 4) that names the device. After the error, nothing
of ours runs there any more, at the latest some seconds after the connection is gone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from gemma_edge.devices.machine.child import SIGNAL_BASE, ChildError, ChildRun
from gemma_edge.runtime.errors import DeviceError

Kind = Literal["local", "ssh", "adb"]
# Bytes that are on the device so far, and bytes in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DeviceFacts:
    """A device as it describes itself; unknown values are None or empty."""

    spec: str
    kind: Kind
    name: str  # the host name, or Android's maker and model
    system: str  # "Linux", "Android"
    release: str  # of the distribution or of Android
    kernel: str
    arch: str  # as uname tells: x86_64, aarch64
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    core_khz: tuple[int, ...]  # highest frequency of each core
    big_cores: tuple[int, ...]  # the cores that are as fast as the fastest; all of them on most machines
    governors: tuple[str, ...]  # those in use
    memory_bytes: int
    memory_available_bytes: int
    free_bytes: int  # where pushed files go
    temperature_c: float | None  # the hottest sensor near the processor
    thermal_status: int | None  # Android: 0 none, 1 light, ... 6 shutdown
    battery_percent: int | None
    battery_c: float | None
    on_power: bool | None  # a charger, or the mains
    python: str | None  # version of the device's python3
    libc: str | None  # "glibc 2.36", "bionic", "musl"
    notes: tuple[str, ...] = ()  # what could not be found out, and why
    python_program: str = "python3"  # whose version `python` is
    bits: int | None = None  # of programs: a 64-bit kernel may run a 32-bit system
    page_bytes: int | None = None
    swap_bytes: int = 0
    swap_used_bytes: int = 0
    zram: bool = False  # all swap is compressed memory: no SD card wears
    memory_controller: bool | None = None  # of control groups; None: the kernel has none, or does not tell
    boot_file: str | None = None  # that holds the kernel's command line
    throttled: tuple[str, ...] | None = None  # reasons in force now (Raspberry Pi)
    was_throttled: tuple[str, ...] = ()  # reasons since the start
    packages: tuple[tuple[str, str], ...] = ()  # Python packages in our environments there: name, version


@dataclass(frozen=True)
class MemoryPoint:
    """Memory of a running program: seconds since its start, and bytes."""

    seconds: float
    rss_anon: int
    rss_file: int
    rss: int


@dataclass(frozen=True)
class DeviceRun(ChildRun):
    """How a program on a device ended: as `ChildRun`, sampled on the device itself.

    `seconds` is the device's own time from start to end; no connection is in it.
    """

    samples: tuple[MemoryPoint, ...] = field(default=())
    cores: tuple[int, ...] | None = None  # that it was bound to; None: to none

    def check(self, what: str) -> Self:
        """This run, if it succeeded.

        Raises:
            DeviceError: a signal ended the program: killed for its memory, crashed.
            ChildError: it ended with another exit code than 0, which is kept.
        """
        if self.exit_code > SIGNAL_BASE:
            raise DeviceError(f"{what} was ended by {signal_name(self.exit_code)}: {self.last_line()}")
        if self.exit_code:
            raise ChildError(what, self)
        return self


class Device(Protocol):
    """A place where programs run. All our files there are in one folder."""

    @property
    def spec(self) -> str: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def facts(self) -> DeviceFacts:
        """The device as it was when first asked: one probe a connection."""
        ...

    def probe(self) -> DeviceFacts:
        """The device as it is now."""
        ...

    def push(self, source: Path, *, progress: Progress | None = None) -> str:
        """Copies a file or a folder to the device; returns its path there.

        Files that the device already has, by SHA-256, are not sent again; an interrupted file is continued.
        """
        ...

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        env: Mapping[str, str] | None = None,
        cores: Sequence[int] | None = None,
        interval: float = 0.25,
        what: str | None = None,
    ) -> DeviceRun:
        """Runs a program to its end in our folder, with an empty stdin.

        Args:
            timeout: seconds after which the program is killed, with all processes that it started.
            env: variables beside those that the device sets.
            cores: numbers of the processor cores to bind it to.
            interval: seconds between two samples of its memory.
            what: its name in errors, argv[0] by default.

        Raises:
            DeviceError: the program cannot be started or did not finish in time, or the device is gone.
        """
        ...

    def pull(self, path: str, target: Path) -> None:
        """Copies a file from the device to `target`, which is written completely or not at all."""
        ...

    def python(self) -> str:
        """The path of the device's interpreter with this version of gemma-edge, installed now if needed.

        Raises:
            DeviceError: the device cannot have one, as on Android.
        """
        ...

    def temperature(self) -> float | None:
        """Degrees Celsius as in `DeviceFacts.temperature_c`, now."""
        ...

    def awake(self) -> AbstractContextManager[None]:
        """Keeps the screen on in the `with` block and restores the former setting."""
        ...

    def close(self) -> None:
        """Ends running programs and the connection; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


def cool_down(device: Device, to_c: float, *, cap_s: float = 300.0, interval: float = 5.0) -> bool:
    """Waits until a device is at or below `to_c` degrees Celsius, at most `cap_s` seconds.

    Returns:
        Whether it is; False at once for a device that reports no temperature.
    """
    start = time.monotonic()
    degrees = device.temperature()
    while degrees is not None and degrees > to_c and (left := cap_s - (time.monotonic() - start)) > 0:
        time.sleep(min(interval, left))
        degrees = device.temperature()
    return degrees is not None and degrees <= to_c


def signal_name(exit_code: int) -> str:
    """What a shell's exit code above 128 says: "signal 9 (SIGKILL: most often too little memory)"."""
    number = exit_code - SIGNAL_BASE
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    hint = ": most often too little memory" if number == signal.SIGKILL else ""
    return f"signal {number} ({name}{hint})"
