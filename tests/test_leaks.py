"""A short version of `tests/leaks.py`: nothing is left behind by generations, nor by loads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("leaks.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self")
def test_a_hundred_generations_and_twenty_loads_leave_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--generations", "100", "--loads", "20"],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr[-500:]
    # So few rounds say little about the heap; what stays open shows at once.
    assert all(re.search(r"open files (\+0|-\d+), threads (\+0|-\d+)$", line) for line in lines), done.stdout
