"""A helper process must not outlive the process that it works for."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """In a child, first of all: the kernel kills this process when its parent ends, however that ends. Linux
    only.

    Args:
        parent: the process id of the parent; if it has ended already, this process ends now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
