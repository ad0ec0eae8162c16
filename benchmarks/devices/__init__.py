"""Where a measured program runs: this machine, one behind ssh, one behind adb."""

from gemma_edge.benchmarks.devices.base import (
    CoolDown,
    Device,
    DeviceFacts,
    DeviceRun,
    MemoryPoint,
    cool_down,
    open_device,
)

__all__ = ["CoolDown", "Device", "DeviceFacts", "DeviceRun", "MemoryPoint", "cool_down", "open_device"]
