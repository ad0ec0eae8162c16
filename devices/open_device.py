"""`open_device(spec)`: the registry of device kinds.

| spec | |
|---|---|
| `local` | this machine |
| `ssh://[user@]host[:port][/folder]` | Linux behind OpenSSH, by key; `folder` instead of `~/.gemma-edge` |
| `adb`, `adb:SERIAL` | Android behind the `adb` program; a serial like `host:port` is connected first |
"""

from __future__ import annotations

from gemma_edge.devices.adb import AdbDevice
from gemma_edge.devices.base import Device
from gemma_edge.devices.local import LocalDevice
from gemma_edge.devices.ssh import SCHEME, SshDevice
from gemma_edge.runtime.errors import UsageError


def open_device(spec: str) -> Device:
    """Connects to a device.

    Raises:
        UsageError: `spec` names no kind of device.
        DeviceError: the device does not answer, or refuses.
    """
    if spec == "local":
        return LocalDevice()
    if spec.startswith(SCHEME):
        return SshDevice.connect(spec)
    if spec == "adb" or spec.startswith("adb:"):
        return AdbDevice.connect(spec)
    raise UsageError(f"--device {spec}: expected local, ssh://[user@]host[:port][/folder], adb or adb:SERIAL")
