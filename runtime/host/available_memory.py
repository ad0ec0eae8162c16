"""Memory that this process may still take, by the system and its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes of anonymous memory that are left; None where nobody tells (no Linux).

    That is what the kernel says can be had without swapping, and, for every control group with a limit, the
    limit without the anonymous memory in it: file pages there can be taken back.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        fields = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
        room = int(fields["MemAvailable"][0]) << 10
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return max(0, min([room, *_left_in_groups(proc, cgroups)]))


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Bytes left below the limit of each group that this process is in."""
    try:
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, limit, used = cgroups, "memory.max", "anon"
        elif "memory" in controllers.split(","):
            root, limit, used = cgroups / "memory", "memory.limit_in_bytes", "total_rss"
        else:
            continue
        folder = root / path.lstrip("/")
        # Within a container the path is the host's, and the group itself is mounted at the root.
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            try:
                most = int((place / limit).read_text())  # "max" is no limit, and no number
                stat = dict(entry.split() for entry in (place / "memory.stat").read_text().splitlines())
                yield most - int(stat[used])
            except (OSError, ValueError, KeyError):
                continue
