"""Linux devices behind OpenSSH: Raspberry Pi, Jetson and others.

One connection (a ControlMaster) is opened at the start, by key and without prompts; every command uses it.
Its remote end runs until its stdin closes, so neither end outlives the other, even after Ctrl-C or a kill.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO, Self
from urllib.parse import unquote, urlsplit

from gemma_edge.devices.install import install
from gemma_edge.devices.push import FileDevice
from gemma_edge.devices.shell import ending
from gemma_edge.runtime.errors import DeviceError, UsageError

SCHEME = "ssh://"
CONFIG_VARIABLE = "GEMMA_EDGE_SSH_CONFIG"  # a file for ssh -F instead of ~/.ssh/config
CONNECT_S = 10
LOGIN_S = 60.0  # until a shell there answers: a board that swaps takes its time
_ALIVE = ("ServerAliveInterval=5", "ServerAliveCountMax=3")
_OPTIONS = (
    "BatchMode=yes",
    f"ConnectTimeout={CONNECT_S}",
    *_ALIVE,
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "LogLevel=ERROR",
)
_READY = b"gemma-edge-ready"
# What ssh says, and what to do about it.
_REMEDIES = (
    ("Permission denied", "it refuses our key: ssh-copy-id puts it there"),
    ("Host key verification failed", "its host key is not known, or has changed: ssh to it once by hand"),
    ("Could not resolve hostname", "no such host name"),
    ("Connection refused", "nothing listens there: is sshd running?"),
    ("timed out", "it does not answer: is it on, and on this network?"),
    ("No route to host", "it does not answer: is it on, and on this network?"),
    ("Network is unreachable", "no network"),
    ("bad configuration option", "its ssh configuration cannot be read"),
)


class SshDevice(FileDevice):
    """`ssh://[user@]host[:port][/folder]`; `SshDevice.connect` makes one."""

    def __init__(self, spec: str, target: list[str], root: str) -> None:
        super().__init__(spec, "ssh", root)
        self._target = target
        self._sockets = tempfile.mkdtemp(prefix="ge-ssh-")
        self._master: subprocess.Popen[bytes] | None = None

    @classmethod
    def connect(cls, spec: str) -> Self:
        """Connects and makes our folder there.

        Raises:
            UsageError: `spec` is malformed.
            DeviceError: ssh is not installed, the host is unknown or refuses the key, or its disk is full.
        """
        target, folder = _parse(spec)
        if shutil.which("ssh") is None:
            raise DeviceError(f"{spec}: ssh is not installed; install OpenSSH's client")
        device = cls(spec, target, folder)
        try:
            home = device._open_master()
            device.root = folder or f"{home}/.gemma-edge"
            device.prepare()
        except BaseException:
            device.close()
            raise
        return device

    def argv(self, line: str) -> list[str]:
        # Without the master, ssh opens a new connection, which works too.
        return ["ssh", *self._options(), "-o", "ControlMaster=no", "-T", *self._target, line]

    def explain(self, said: str) -> str:
        for text, meaning in _REMEDIES:
            if text.lower() in said.lower():
                return f"no connection: {meaning} ({said})"
        return f"the connection broke ({said})" if said else "the connection broke"

    def python(self) -> str:
        return install(self)

    def close(self) -> None:
        super().close()
        if self._master is not None:
            with ending(self._master):
                pass
            self._master = None
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _options(self) -> list[str]:
        options = [word for option in _OPTIONS for word in ("-o", option)]
        if config := os.environ.get(CONFIG_VARIABLE):
            options = ["-F", config, *options]
        return [*options, "-o", f"ControlPath={self._sockets}/%C"]

    def _open_master(self) -> str:
        """Connects; returns the home folder there."""
        line = f"exec sh -c 'echo; echo {_READY.decode()}; echo \"$HOME\"; exec cat >/dev/null'"
        argv = ["ssh", *self._options(), "-o", "ControlMaster=yes", "-T", *self._target, line]
        with tempfile.TemporaryFile() as err:
            self._master = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, start_new_session=True
            )
            assert self._master.stdout is not None  # for the type checker: it is a pipe
            # Connecting is bounded by ConnectTimeout; a server that accepts and says nothing is not.
            timer = threading.Timer(LOGIN_S, self._master.kill)
            timer.start()
            try:
                home = _greeting(self._master.stdout)
            finally:
                timer.cancel()
            if home is None:
                err.seek(0)
                lines = err.read().decode("utf-8", "replace").replace("\r", "").strip().splitlines()
                raise self.error(self.explain(lines[-1] if lines else "timed out"))
        return home


def _greeting(stream: IO[bytes]) -> str | None:
    """The line after the ready mark; earlier output of the login is skipped."""
    for line in stream:
        if line.strip() == _READY:
            return next(stream, b"").decode("utf-8", "surrogateescape").rstrip("\n")
    return None


def _parse(spec: str) -> tuple[list[str], str]:
    """ssh's arguments for the target, and the folder or ""."""
    with contextlib.suppress(ValueError):  # from .port
        url = urlsplit(spec)
        host = url.hostname or ""
        # ssh would obey an option in place of the host.
        if (
            url.scheme == "ssh"
            and host
            and not host.startswith("-")
            and not url.query
            and url.password is None
        ):
            user = ["-l", unquote(url.username)] if url.username else []
            port = ["-p", str(url.port)] if url.port else []
            folder = unquote(url.path).rstrip("/")
            return [*user, *port, host], str(Path(folder)) if folder else ""
    raise UsageError(f"{spec}: expected ssh://[user@]host[:port][/folder]; keys, not passwords")
