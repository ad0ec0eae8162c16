"""Runs a command under a memory limit that the kernel enforces.

The command runs in a control group of its own, below the caller's group, so the caller's limits hold too.
Every page that the command touches counts: heap, KV cache, page cache of the files it reads. The kernel
reclaims cached file pages under pressure, so a mapped file may be larger than the limit. If the rest does not
fit, the kernel kills the command. Swap is off, because a phone does not swap to flash.

A page is charged to the group that brought it into the cache. So drop the cache first
(`memory.drop_page_cache`), or the run uses memory that is not counted.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from gemma_edge.devices.machine.child import SIGNAL_BASE, ChildRun, run_child
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.files.abandoned import temporary_folder

MechanismName = Literal["cgroup-v1", "cgroup-v2", "systemd-run", "none"]

PROC_SELF = Path("/proc/self")
# $0 is the group's cgroup.procs. The shell joins and then becomes the command: nothing runs outside.
_JOIN = 'echo $$ > "$0" && exec "$@"'
# $0 is a folder. The kernel kills the command, which is the largest, and not this shell.
_COUNT = """"$@"; code=$?
group=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
for file in memory.events memory.peak; do cat "$group/$file" > "$0/$file" 2>/dev/null; done
exit $code"""
# Since systemd 253 a scope is stopped after an out-of-memory kill, unless told otherwise; older refuse this.
_SCOPE_PROPERTIES: tuple[tuple[str, ...], ...] = (("OOMPolicy=continue",), ())
_PROBE_LIMIT = 64 * 2**20
_serial = itertools.count()


@dataclass(frozen=True)
class Mechanism:
    """How a limit can be enforced here: `name`, why not where it is "none", and the group to nest in.

    With systemd-run there is no group of ours: `properties` are what its version needs to be told.
    """

    name: MechanismName
    reason: str = ""
    parent: Path | None = None
    properties: tuple[str, ...] = ()


@dataclass(frozen=True)
class LimitedRun(ChildRun):
    """A run under a limit; sizes in bytes.

    `killed` is the kernel's doing: SIGKILL together with an out-of-memory kill counted in the group.
    (The fail counter of v1 is no evidence: it stays 0 on recent kernels.)
    """

    killed: bool
    limit_bytes: int
    peak_bytes: int | None  # heap and page cache together; None before Linux 5.19 on cgroup v2
    mechanism: MechanismName


class _Files(NamedTuple):
    """File names of one generation of control groups."""

    peak: str
    oom_kills: str  # a file of "key value" lines, oom_kill among them
    # In this order: v1 refuses a memory + swap limit below the memory limit.
    settings: tuple[tuple[str, str], ...]


_FILES: dict[str, _Files] = {
    "cgroup-v1": _Files(
        "memory.max_usage_in_bytes",
        "memory.oom_control",
        (
            ("memory.limit_in_bytes", "{limit}"),
            ("memory.memsw.limit_in_bytes", "{limit}"),
            ("memory.swappiness", "0"),
        ),
    ),
    "cgroup-v2": _Files(
        "memory.peak",
        "memory.events",
        (("memory.max", "{limit}"), ("memory.swap.max", "0"), ("memory.oom.group", "1")),
    ),
}


@functools.cache
def mechanism() -> Mechanism:
    """The mechanism that works here, found by trying: a group is made, joined by `true` and removed."""
    refusals = []
    for candidate in _candidates():
        try:
            run = _run_in_group(*candidate, ["true"], _PROBE_LIMIT, timeout=30, env=None)
        except (OSError, DeviceError) as error:
            refusals.append(f"{candidate.name} at {candidate.parent}: {error}")
            continue
        if run.exit_code == 0:
            return Mechanism(candidate.name, "", candidate.parent)
        refusals.append(f"{candidate.name} at {candidate.parent}: {run.last_line()}")
    # For a user who may not write control groups, systemd makes one.
    for properties in _SCOPE_PROPERTIES if shutil.which("systemd-run") else ():
        try:
            run = _run_in_scope(properties, ["true"], _PROBE_LIMIT, timeout=30, env=None)
        except (OSError, DeviceError) as error:
            refusals.append(f"systemd-run: {error}")
            continue
        if run.exit_code == 0:
            return Mechanism("systemd-run", "", None, properties)
        refusals.append(f"systemd-run: {run.last_line()}")
    return Mechanism("none", "; ".join(refusals) or "no memory control group is mounted")


def run_limited(
    argv: Sequence[str],
    limit_bytes: int,
    *,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> LimitedRun:
    """Runs a command under a memory limit and removes the group afterwards, whatever happens.

    Args:
        limit_bytes: the limit on all pages that it touches; the kernel rounds down to whole pages.
        timeout: seconds after which the command's process group is killed.
        env: its complete environment; None inherits ours.

    Raises:
        DeviceError: no limit can be enforced here (with the reason), or the command did not finish in time.
    """
    found = mechanism()
    if found.name == "systemd-run":
        return _run_in_scope(found.properties, argv, limit_bytes, timeout=timeout, env=env)
    if found.parent is None:
        raise DeviceError(f"a memory limit cannot be enforced here: {found.reason}")
    return _run_in_group(found.name, found.parent, argv, limit_bytes, timeout=timeout, env=env)


def _run_in_group(
    name: MechanismName,
    parent: Path,
    argv: Sequence[str],
    limit: int,
    *,
    timeout: float | None,
    env: Mapping[str, str] | None,
) -> LimitedRun:
    files = _FILES[name]
    with _group(parent, limit, files) as group:
        join = ["/bin/sh", "-c", _JOIN, str(group / "cgroup.procs")]
        run = run_child([*join, *argv], timeout=timeout, env=env, what=argv[0])
        peak = group / files.peak
        return LimitedRun(
            **vars(run),
            killed=_oom_kills(group / files.oom_kills) > 0 and run.exit_code == SIGNAL_BASE + signal.SIGKILL,
            limit_bytes=limit,
            peak_bytes=int(peak.read_text()) if peak.exists() else None,
            mechanism=name,
        )


def _run_in_scope(
    properties: Sequence[str],
    argv: Sequence[str],
    limit: int,
    *,
    timeout: float | None,
    env: Mapping[str, str] | None,
) -> LimitedRun:
    """Runs a command in a scope unit. Its group is gone afterwards, so a shell inside saves the counts.

    Raises:
        DeviceError: it did not finish in time, or the scope counts no out-of-memory kills.
    """
    with temporary_folder("scope") as folder:
        scope = ["systemd-run", *(["--user"] if os.geteuid() else []), "--scope", "--quiet", "--collect"]
        for setting in (f"MemoryMax={limit}", "MemorySwapMax=0", *properties):
            scope += ["-p", setting]
        run = run_child([*scope, "/bin/sh", "-c", _COUNT, str(folder), *argv], timeout=timeout, env=env)
        events, peak = Path(folder, "memory.events"), Path(folder, "memory.peak")
        if not events.is_file() or not events.read_text().strip():
            raise DeviceError(f"its scope counts no memory: {run.last_line()}")
        highest = peak.read_text().strip() if peak.is_file() else ""
        return LimitedRun(
            **vars(run),
            killed=_oom_kills(events) > 0 and run.exit_code == SIGNAL_BASE + signal.SIGKILL,
            limit_bytes=limit,
            peak_bytes=int(highest) if highest else None,
            mechanism="systemd-run",
        )


@contextlib.contextmanager
def _group(parent: Path, limit: int, files: _Files) -> Iterator[Path]:
    """A new group with its limit set; afterwards its processes are killed and it is removed."""
    group = parent / f"gemma-edge-{os.getpid()}-{next(_serial)}"
    group.mkdir()
    try:
        for name, value in files.settings:
            # The swap files are missing on a kernel without swap accounting, oom.group before Linux 4.19.
            if (group / name).exists():
                (group / name).write_text(value.format(limit=limit))
        yield group
    finally:
        _remove(group)


def _remove(group: Path, patience: float = 5.0) -> None:
    # A dying process keeps its group busy until the kernel has freed its pages: milliseconds a gigabyte.
    deadline = time.monotonic() + patience
    while True:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise DeviceError(f"the control group {group} cannot be removed: {error.strerror}") from None
        time.sleep(0.01)


def _oom_kills(path: Path) -> int:
    pairs = (line.split() for line in path.read_text().splitlines())
    return next((int(value) for key, value in pairs if key == "oom_kill"), 0)


class _Candidate(NamedTuple):
    name: MechanismName
    parent: Path


def _candidates() -> Iterator[_Candidate]:
    """Groups that a child group can be made in, v1 first: on a hybrid system v1 has the memory controller."""
    try:
        mounts = (PROC_SELF / "mountinfo").read_text().splitlines()
        memberships = [line.split(":", 2) for line in (PROC_SELF / "cgroup").read_text().splitlines()]
    except OSError:
        return
    v1 = next((path for _, names, path in memberships if "memory" in names.split(",")), None)
    v2 = next((path for number, names, path in memberships if number == "0" and not names), None)
    for kind, options, root, mount in map(_parse_mount, mounts):
        if kind == "cgroup" and "memory" in options and v1 is not None:
            yield _Candidate("cgroup-v1", _below(mount, root, v1))
    for kind, _, root, mount in map(_parse_mount, mounts):
        if kind == "cgroup2" and v2 is not None:
            parent = _v2_parent(mount, _below(mount, root, v2))
            if parent is not None:
                yield _Candidate("cgroup-v2", parent)


def _parse_mount(line: str) -> tuple[str, list[str], str, Path]:
    """File system type, its options, the root of the mount in it, and the mount point."""
    before, _, after = line.partition(" - ")
    fields, (kind, _, *options) = before.split(), after.split()
    return kind, options[0].split(",") if options else [], fields[3], Path(fields[4])


def _below(mount: Path, root: str, path: str) -> Path:
    """A group's folder; in a container the mount shows the hierarchy from `root` down only."""
    group = PurePosixPath(path)
    relative = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath("/")
    return mount / str(relative).lstrip("/")


def _v2_parent(mount: Path, own: Path) -> Path | None:
    """The nearest group that hands the memory controller to its children.

    In v2 a group that does so holds no processes itself, so it is usually not our own group but the slice
    that it is in; and this is why no controller is switched on here.
    """
    for group in (own, *own.parents):
        try:
            if "memory" in (group / "cgroup.subtree_control").read_text().split():
                return group
        except OSError:
            pass
        if group == mount:
            return None
    return None
