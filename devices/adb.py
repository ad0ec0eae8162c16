"""Android devices, through the `adb` program.

Every call names the serial (`-s`), so that it never reaches a phone plugged in later. Streams and exit codes
need the shell protocol of Android 7; older daemons are refused.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from typing import Self

from gemma_edge.devices.facts import parse_meminfo
from gemma_edge.devices.push import FileDevice
from gemma_edge.devices.shell import ANSWER_S
from gemma_edge.runtime.errors import DeviceError

ROOT = "/data/local/tmp/gemma-edge"  # the one place where adb's user may write and execute
_ADDRESS = re.compile(r"[^/]+:\d+")  # a serial that is a network address
_KEPT = "stayon.before"  # what the setting was, on the device: a later connection can restore it
_SETTING = "global stay_on_while_plugged_in"
_RESTORE = (
    f"[ ! -f {_KEPT} ] || {{ read -r value <{_KEPT};"
    f' case $value in *[0-9]) settings put {_SETTING} "$value" ;; *) settings delete {_SETTING} ;; esac;'
    f" }} >/dev/null && rm -f {_KEPT}"
)
_REMEDIES = {
    "unauthorized": "accept this computer's key on the device's screen, then try again",
    "offline": "unplug it and plug it in again, or restart it",
    "no permissions": "this user may not open it: see developer.android.com/studio/run/device, udev rules",
    "authorizing": "accept this computer's key on the device's screen, then try again",
    "recovery": "start Android on it",
    "sideload": "start Android on it",
    "bootloader": "start Android on it",
}


class AdbDevice(FileDevice):
    """`adb` or `adb:SERIAL`; `AdbDevice.connect` makes one."""

    def __init__(self, spec: str, serial: str) -> None:
        super().__init__(spec, "adb", ROOT)
        self.serial = serial

    @classmethod
    def connect(cls, spec: str) -> Self:
        """Finds the device and makes our folder there. Connects to a serial like `host:port` first.

        Raises:
            DeviceError: adb is missing; the device is missing, ambiguous, unauthorized, too old or full.
        """
        if shutil.which("adb") is None:
            raise DeviceError(f"{spec}: adb is not installed; install Android's platform tools")
        _adb(spec, "start-server")
        device = cls(spec, _serial(spec, spec.partition(":")[2]))
        if "shell_v2" not in _adb(spec, "-s", device.serial, "features").split():
            raise device.error("its adb daemon is older than Android 7 and reports no exit codes")
        device.prepare()
        device.answer(device.here(_RESTORE))
        return device

    def argv(self, line: str) -> list[str]:
        return ["adb", "-s", self.serial, "shell", "-T", line]

    def explain(self, said: str) -> str:
        state = next((state for state in _REMEDIES if state in said.lower()), None)
        if state is not None:
            return f"no connection, it is {state}: {_REMEDIES[state]}"
        return f"the connection broke ({said})" if said else "the connection broke"

    def python(self) -> str:
        raise self.error("Android has no Python; the native runner measures a .litertlm there")

    def here(self, script: str) -> str:
        """A script that runs in our folder."""
        return f"cd {shlex.quote(self.root)} || exit 1\n{script}"

    def meminfo(self, process: str) -> dict[str, int]:
        """Android's own count of a process's bytes, by its number or package: {"pss", "rss"}.

        Raises:
            DeviceError: no such process, or no such service.
        """
        said = self.sh(f"dumpsys meminfo {shlex.quote(process)}")
        found = parse_meminfo(said)
        if not found:
            raise self.error(f"dumpsys meminfo has no figures for {process}: {said.strip()[:80]}")
        return found

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        script = (
            "command -v svc >/dev/null && command -v settings >/dev/null || exit 0\n"
            f"settings get {_SETTING} >{_KEPT} && svc power stayon true\n"
            "input keyevent KEYCODE_WAKEUP >/dev/null 2>&1\nexit 0"
        )
        self.sh(self.here(script))
        try:
            yield
        finally:
            # A device that has gone is restored when it comes back: see `connect`.
            with contextlib.suppress(DeviceError):
                self.sh(self.here(_RESTORE))


def _serial(spec: str, wanted: str) -> str:
    """The serial of the one device that `spec` selects, in state "device"."""
    states = _states(spec)
    if wanted and wanted not in states and _ADDRESS.fullmatch(wanted):
        said = _adb(spec, "connect", wanted)
        states = _states(spec)
        if wanted not in states:
            raise DeviceError(f"{spec}: {said.strip() or 'no connection'}")
    if wanted and wanted not in states:
        found = ", ".join(sorted(states)) or "none"
        raise DeviceError(f"{spec}: no such device; adb devices lists: {found}")
    if not states:
        raise DeviceError(f"{spec}: no device; plug one in and enable USB debugging on it")
    if not wanted and len(states) > 1:
        choices = " or ".join(f"adb:{serial}" for serial in sorted(states))
        raise DeviceError(f"{spec}: several devices; choose {choices}")
    serial = wanted or next(iter(states))
    state = states[serial]
    if state != "device":
        remedy = next((text for key, text in _REMEDIES.items() if state.startswith(key)), "it is not ready")
        raise DeviceError(f"{spec}: {serial} is {state}: {remedy}")
    return serial


def _states(spec: str) -> dict[str, str]:
    """What `adb devices` lists: serial and state; a state may be several words."""
    lines = (line.partition("\t") for line in _adb(spec, "devices").splitlines())
    return {serial: state.strip() for serial, tab, state in lines if tab}


def _adb(spec: str, *words: str) -> str:
    """What adb prints, on either stream."""
    try:
        done = subprocess.run(
            ["adb", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=ANSWER_S,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{spec}: adb {words[0]}: no answer within {ANSWER_S:g} s") from None
    return done.stdout
