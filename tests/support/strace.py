"""Whether strace runs here."""

from __future__ import annotations

import subprocess


def can_trace() -> bool:
    try:
        traced = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return traced.returncode == 0
