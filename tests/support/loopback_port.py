"""A port for a daemon that must be told one: it cannot listen at port 0 and say which it got."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path


def spare_port() -> int:
    """A port of 127.0.0.1 where nothing listens, below those that the kernel gives to others meanwhile."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    choose = random.SystemRandom()  # not what a test has seeded
    while True:
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", choose.randrange(10_000, first) if first > 11_000 else 0))
            port: int = one.getsockname()[1]
            return port
