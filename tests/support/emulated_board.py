"""A board to deploy to: Debian 12 for arm64 with its own sshd, emulated by QEMU as a Cortex-A72 or -A76.

tests/emulated_board.sh unpacks what it needs. Nothing outside the board changes: it has a user namespace of
its own, which has binary formats of its own, since Linux 6.7.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from support.device_servers import Sshd
from support.processes import children, wait_for

FOLDER = Path(os.environ.get("GEMMA_EDGE_BOARD_ROOT", "/var/cache/gemma-edge/board"))
_MAGIC = (
    r":qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:"
    r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:"
)
# $1: the board's root, $2: QEMU, $3: the server's folder, $4: the CPU.
_INIT = f"""\
set -e
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
printf %s '{_MAGIC}'"$2:F" >/proc/sys/fs/binfmt_misc/register
mount -t proc proc "$1/proc"
mount --rbind /sys "$1/sys"
mount --rbind /dev "$1/dev"
mount -t tmpfs none "$1/tmp"
mount -t tmpfs none "$1/run"
mkdir -p "$1/run/sshd" "$1$3"
chmod 755 "$1/run/sshd"
mount --bind "$3" "$1$3"
export PATH=/usr/sbin:/usr/bin:/sbin:/bin QEMU_CPU="$4"
exec chroot "$1" /usr/sbin/sshd -D -e -f "$3/sshd_config"
"""


class EmulatedBoard(Sshd):
    """An emulated board; `folder` must be below /run or /tmp, which are the board's own."""

    def __init__(self, folder: Path, cpu: str) -> None:
        (folder / "home").mkdir()
        super().__init__(folder, folder / "home")
        self._cpu = cpu
        config = folder / "sshd_config"
        config.write_text(config.read_text().replace("SetEnv ", f"SetEnv QEMU_CPU={cpu} "))

    def start(self) -> None:
        words = [_INIT, "board", str(FOLDER / "root"), str(FOLDER / "qemu"), str(self.folder), self._cpu]
        namespaces = ["unshare", "--user", "--mount", "--pid", "--fork", "--kill-child"]
        # A line comes when the namespace has its users; the next program is root in it.
        argv = [*namespaces, "sh", "-c", 'read _ && exec sh -c "$@"', "sh", *words]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=log, stderr=log)
        pid, own = self._process.pid, os.readlink("/proc/self/ns/user")
        wait_for(lambda: os.readlink(f"/proc/{pid}/ns/user") != own, "no user namespace")
        for kind in ("uid", "gid"):
            Path(f"/proc/{pid}/{kind}_map").write_text("0 0 65536\n")
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        wait_for(self._listening, f"the board's sshd does not listen: see {self.folder}/log")

    def kill(self) -> None:
        assert self._process is not None
        # The namespace's first process, and with it all others. It does not see its parent's end: a change of
        # users makes the kernel forget --kill-child.
        for pid in children(self._process.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


def board_missing() -> str | None:
    """Why no board can be emulated here, or None."""
    if os.getuid():
        return "only root may map the users of a board"
    if shutil.which("unshare") is None or not (FOLDER / "root/usr/sbin/sshd").exists():
        return f"no board in {FOLDER} (tests/emulated_board.sh)"
    mount = "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc"
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    made = subprocess.run(argv, capture_output=True)
    return None if made.returncode == 0 else "this kernel has no binary formats of a namespace (Linux 6.7)"
