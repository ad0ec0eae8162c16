"""Whether the clocks of a run can be trusted.

All times are of the monotonic clock, which cannot be set. Two events are worth a note: the wall clock, which
dates the results, was set; or the machine slept, and the monotonic clock stood still.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

TOLERANCE_S = 0.5
DRIFT = 5e-4  # NTP slews a clock by at most this share


@dataclass(frozen=True)
class ClockReading:
    """Seconds of three clocks at one moment; `boot` counts sleep too and is None where there is no such
    clock.
    """

    wall: float
    monotonic: float
    boot: float | None

    @classmethod
    def now(cls) -> ClockReading:
        boot = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else None
        return cls(time.time(), time.monotonic(), boot)

    def notes(self, later: ClockReading) -> list[str]:
        """Events between two readings that a reader of the results should know; most often none."""
        elapsed = later.monotonic - self.monotonic
        slept = 0.0
        notes = []
        if self.boot is not None and later.boot is not None:
            slept = later.boot - self.boot - elapsed
            if slept > TOLERANCE_S:
                notes.append(f"the machine slept for {slept:.1f} s during the run")
        jump = later.wall - self.wall - elapsed - max(slept, 0.0)
        if abs(jump) > TOLERANCE_S + DRIFT * elapsed:
            notes.append(
                f"the wall clock jumped by {jump:+.1f} s during the run; times are of the monotonic clock"
            )
        return notes
