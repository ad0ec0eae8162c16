"""Real daemons to connect to: OpenSSH's sshd on loopback, AOSP's adbd in a network namespace of its own.

tests/install.sh installs what they need. Each can be killed as a device dies: with all it runs
for its connections, but without what those have started.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from support.loopback_port import spare_port
from support.processes import descendants, wait_for

SSHD = Path("/usr/sbin/sshd")
ADBD_ROOT = Path(os.environ.get("GEMMA_EDGE_ADBD_ROOT", "/var/cache/gemma-edge/adbd-root"))

_SSHD_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
# A user's ~/.bashrc may take long; bash reads none in an inner shell.
SetEnv SHLVL=9 HOME={home}
"""
_SSH_CONFIG = """\
Host *
  IdentityFile {folder}/{key}
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
"""
# Stands in for Android's own programs, which Debian's adbd comes without. Each says so.
_SHIMS = {
    "getprop": "echo '[ro.product.manufacturer]: [Debian]'; echo '[ro.product.model]: [stand-in]'\n"
    "echo '[ro.build.version.release]: [14]'",
    "dumpsys": "cat /data/shim/$1",
    "settings": 'case $1 in get) cat /data/shim/stayon ;; put) echo "$4" >/data/shim/stayon ;; esac',
    "svc": "echo 7 >/data/shim/stayon",
    "input": "exit 0",
}
# The first process of the namespaces: it mounts, then starts the daemon whenever it is not there.
_ADBD_INIT = """\
set -e
ip link set lo up
mount -t proc proc "$1/proc"
mount --rbind /sys "$1/sys"
mount -t tmpfs -o size=$5m none "$1/data"
mount -t tmpfs none "$1/tmp"
mount --bind "$2" "$1/usr/local/bin"
mkdir -p "$1/data/local/tmp" "$1/data/shim"
cp "$3"/* "$1/data/shim"
ANDROID_ADB_SERVER_PORT=5037 adb -L "localfilesystem:$4" server nodaemon >"$4.log" 2>&1 &
while :; do
  [ -e "$4.dead" ] || chroot "$1" env -i PATH=/usr/local/bin:/usr/bin:/bin /usr/sbin/adbd >"$4.adbd" 2>&1 || :
  sleep 0.1
done
"""


class Sshd:
    """A running sshd; `url` is the device, `config` the file for ssh -F that reaches it.

    Args:
        home: the home folder of who logs in, instead of the user's own.
    """

    def __init__(self, folder: Path, home: Path | None = None) -> None:
        self.folder, self.port = folder, spare_port()
        self.url = f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"
        self.config = self.ssh_config("user_key")
        for key in ("host_key", "user_key", "other_key"):
            _quiet("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        host_key = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}")
        (folder / "sshd_config").write_text(
            _SSHD_CONFIG.format(port=self.port, folder=folder, home=home or Path.home())
        )
        self._process: subprocess.Popen[bytes] | None = None

    def ssh_config(self, key: str) -> Path:
        path = self.folder / f"config_{key}"
        path.write_text(_SSH_CONFIG.format(folder=self.folder, key=key))
        return path

    def start(self) -> None:
        # For its privilege separation; a system's own start makes it.
        with contextlib.suppress(PermissionError):
            Path("/run/sshd").mkdir(exist_ok=True)
        argv = [str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log)
        wait_for(self._listening, "sshd does not listen")

    def _listening(self) -> bool:
        return _listens(self.port)

    def connections(self) -> list[int]:
        assert self._process is not None
        return list(descendants(self._process.pid, "sshd"))

    def kill(self) -> None:
        """The daemon and its connections die at once; what runs in them is left alone."""
        assert self._process is not None
        for pid in [*self.connections(), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


class Adbd:
    """A running adbd with that size of /data, and the adb server beside it.

    `environment` makes `adb` here use that server.
    """

    SERIAL = "127.0.0.1:5555"

    def __init__(self, folder: Path, megabytes: int = 16) -> None:
        self.socket = folder / "adb"
        self.environment = {"ADB_SERVER_SOCKET": f"localfilesystem:{self.socket}"}
        shims, self.told = folder / "shims", folder / "told"
        shims.mkdir()
        self.told.mkdir()
        for name, text in _SHIMS.items():
            (shims / name).write_text(f"#!/bin/sh\n# A test's stand-in for Android's {name}.\n{text}\n")
            (shims / name).chmod(0o755)
        for name, text in DUMPSYS.items():
            (self.told / name).write_text(text)
        arguments = [str(ADBD_ROOT), str(shims), str(self.told), str(self.socket), str(megabytes)]
        namespaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"]
        if os.getuid():
            namespaces.insert(1, "--map-root-user")
        self._log = (folder / "init.log").open("wb")
        self._process = subprocess.Popen(
            [*namespaces, "bash", "-c", _ADBD_INIT, "adbd-init", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        try:
            wait_for(self._connected, f"adbd does not answer: see {folder}/*.log")
        except BaseException:
            self.close()
            raise

    def kill(self) -> None:
        """The daemon dies and stays away; what it started is left alone."""
        Path(f"{self.socket}.dead").touch()
        for pid in descendants(self._process.pid, "adbd"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def revive(self) -> None:
        Path(f"{self.socket}.dead").unlink()
        wait_for(self._connected, "adbd does not come back")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def adb(self, *words: str) -> str:
        environment = os.environ | self.environment
        argv = ["adb", *words]
        return subprocess.run(argv, capture_output=True, env=environment, encoding="utf-8").stdout

    def _connected(self) -> bool:
        if not self.socket.exists():
            return False
        self.adb("connect", self.SERIAL)
        return self.adb("-s", self.SERIAL, "get-state").strip() == "device"


# In the words of Android 14.
DUMPSYS = {
    "thermalservice": """\
IsStatusOverride: false
ThermalEventListeners:
	callbacks: 4
Thermal Status: 1
Cached temperatures:
	Temperature{mValue=61.2, mType=0, mName=CPU7, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
	Temperature{mValue=48.5, mType=0, mName=CPU0, mStatus=0}
	Temperature{mValue=36.1, mType=3, mName=skin, mStatus=1}
""",
    "battery": """\
Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  level: 83
  scale: 100
  temperature: 291
""",
    "meminfo": """\
** MEMINFO in pid 4321 [gemma-bench] **
           TOTAL PSS:    82944            TOTAL RSS:   101376      TOTAL SWAP (KB):        0
""",
    "stayon": "0\n",
}


def sshd_missing() -> str | None:
    """Why no sshd can be had here, or None."""
    if not SSHD.exists():
        return f"no {SSHD}"
    return None if shutil.which("ssh") and shutil.which("ssh-keygen") else "no OpenSSH client"


def adbd_missing() -> str | None:
    """Why no adbd can be had here, or None."""
    if shutil.which("adb") is None:
        return "no adb"
    if not (ADBD_ROOT / "usr/sbin/adbd").exists():
        return f"no adbd below {ADBD_ROOT} (tests/install.sh)"
    namespaces = [
        "unshare",
        *(["--map-root-user"] if os.getuid() else []),
        "--net",
        "--mount",
        "--pid",
        "--fork",
    ]
    made = subprocess.run([*namespaces, "true"], capture_output=True)
    return None if made.returncode == 0 else "no namespaces here"


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _quiet(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)
