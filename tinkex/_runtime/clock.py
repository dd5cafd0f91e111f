"""The clock everything waits by: injectable, so that tests need not sleep."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings of the time, in seconds."""

    def monotonic(self) -> float:
        """Seconds that never jump; for deadlines.  They stand still while the machine sleeps."""

    def wall(self) -> float:
        """Seconds since the epoch; for timestamps, and to notice that the machine slept."""


class SystemClock:
    """The real clock."""

    def monotonic(self) -> float:
        """Read ``time.monotonic``."""
        return time.monotonic()

    def wall(self) -> float:
        """Read ``time.time``."""
        return time.time()


SYSTEM_CLOCK = SystemClock()
