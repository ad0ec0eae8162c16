"""Devices that run our programs: this machine, one behind ssh, one behind adb."""

from gemma_edge.devices.base import (
    Device,
    DeviceFacts,
    DeviceRun,
    MemoryPoint,
    cool_down,
)
from gemma_edge.devices.fleet import Member, Outcome, read_fleet, run_fleet
from gemma_edge.devices.open_device import open_device

__all__ = [
    "Device",
    "DeviceFacts",
    "DeviceRun",
    "Member",
    "MemoryPoint",
    "Outcome",
    "cool_down",
    "open_device",
    "read_fleet",
    "run_fleet",
]
