"""What a process holds in memory, as the kernel counts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class ResidentMemory:
    """Bytes: `anon` must stay in RAM, `file` can be read again; `peak` is the most that both ever were."""

    anon: int = 0
    file: int = 0
    shared: int = 0
    peak: int = 0


_FIELDS = {"RssAnon": "anon", "RssFile": "file", "RssShmem": "shared", "VmHWM": "peak"}


def resident_memory(pid: int | str = "self", proc: Path = PROC) -> ResidentMemory:
    """A process's memory; zeros for one without any (a zombie), and where /proc is none.

    Raises:
        OSError: there is no such process.
    """
    path = proc / str(pid) / "status"
    if pid == "self" and not path.exists():
        return ResidentMemory()
    with open(path, "rb", buffering=0) as file:
        text = file.read(16_384).decode("utf-8", "replace")
    lines = (line.partition(":") for line in text.splitlines())
    sizes = {_FIELDS[key]: int(value.split()[0]) << 10 for key, _, value in lines if key in _FIELDS}
    return ResidentMemory(**sizes)
