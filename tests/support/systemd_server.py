"""A machine behind ssh whose user has a systemd of his own, as on a board: sshd and `systemd --user`.

Both run in namespaces of their own, with a /run of their own; the machine's own init may be anything.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from pathlib import Path

from support.device_servers import SSHD, Sshd
from support.processes import children, wait_for

SYSTEMD = Path("/lib/systemd/systemd")
# $1: the server's folder, $2: the home of who logs in, $3: a control group of ours.
_INIT = f"""\
mount -t tmpfs none /run || exit
mkdir -p /run/sshd /run/systemd/system /run/user/0 && chmod 700 /run/user/0 || exit
(
  echo $$ >"$3/cgroup.procs"
  unset XDG_CONFIG_HOME XDG_DATA_HOME XDG_CONFIG_DIRS DBUS_SESSION_BUS_ADDRESS
  HOME=$2 XDG_RUNTIME_DIR=/run/user/0 exec {SYSTEMD} --user
) >"$1/systemd.log" 2>&1 &
{SSHD} -D -e -f "$1/sshd_config" &
wait
"""


class SystemdServer(Sshd):
    """See the module. To be had where `systemd_missing` says so."""

    def start(self) -> None:
        home = self.folder / "home"
        self._group = tempfile.mkdtemp(prefix="gemma-edge-", dir=_groups()[0])
        words = ["sh", "-c", _INIT, "init", str(self.folder), str(home), self._group]
        argv = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", *words]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log)
        wait_for(self._listening, f"sshd does not listen: see {self.folder}/log")

    def has_systemd(self) -> bool:
        """Whether it runs: control groups may be refused to it."""
        assert self._process is not None
        (init,) = children(self._process.pid)
        socket = Path(f"/proc/{init}/root/run/user/0/systemd/private")
        # Its children: systemd and sshd.
        wait_for(lambda: socket.exists() or len(children(init)) < 2, "systemd neither answers nor ends")
        return socket.exists()

    def kill(self) -> None:
        assert self._process is not None
        for pid in children(self._process.pid):
            os.kill(pid, signal.SIGKILL)  # the namespace's first process, and with it all others
        self._process.wait()
        for folder, _, _ in os.walk(self._group, topdown=False):
            # It may be in use for a moment after its last process.
            wait_for(lambda folder=folder: _removed(folder), f"{folder} is in use")


def _removed(folder: str) -> bool:
    with contextlib.suppress(OSError):
        os.rmdir(folder)
    return not os.path.exists(folder)


def _groups() -> list[Path]:
    """Hierarchies of control groups in which systemd keeps its own."""
    root = Path("/sys/fs/cgroup")
    return [each for each in (root / "systemd", root) if (each / "cgroup.procs").exists()]


def systemd_missing() -> str | None:
    """Why no systemd can be started for a user here, or None."""
    if os.getuid():
        return "only root may make the namespaces of a systemd"
    if not SYSTEMD.exists():
        return f"no {SYSTEMD}"
    return None if _groups() and os.access(_groups()[0], os.W_OK) else "no writable control groups"
