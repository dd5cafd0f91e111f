"""The clock that all waits use, and the pacing of long waits.

`Clock` is injectable, so that tests need not sleep.  `LongWait` paces one wait of one thread: the
thread blocks for `LongWait.slice_s` at a time, and logs why it waits when a notice is due.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Optional, Protocol

#: The longest pause between two notices about one wait, in seconds.
LONGEST_NOTICE_S = 300.0

#: On Windows, Ctrl-C cannot interrupt a wait for a lock or a queue before Python 3.14.
_LONGEST_SLICE_S = 0.25 if sys.platform == "win32" else LONGEST_NOTICE_S


class Clock(Protocol):
    """Two readings of the time, in seconds."""

    def monotonic(self) -> float:
        """Seconds that never jump, for deadlines.  They stand still while the machine sleeps."""

    def wall(self) -> float:
        """Seconds since the epoch, for timestamps, and to notice that the machine slept."""


class SystemClock:
    """The real clock."""

    def monotonic(self) -> float:
        """Read ``time.monotonic``."""
        return time.monotonic()

    def wall(self) -> float:
        """Read ``time.time``."""
        return time.time()


SYSTEM_CLOCK = SystemClock()


class LongWait:
    """One wait, which begins now.

    Args:
        notice_after_s: seconds until the first notice; each further pause is twice the previous
            one, up to LONGEST_NOTICE_S.
        timeout_s: seconds until the wait is over; None means no limit.
    """

    __slots__ = ("_began", "_deadline", "_notice_at", "_pause_s", "timeout_s")

    def __init__(self, notice_after_s: float, timeout_s: Optional[float] = None) -> None:
        self.timeout_s = timeout_s
        self._began = time.monotonic()
        self._deadline = math.inf if timeout_s is None else self._began + timeout_s
        self._pause_s = notice_after_s
        self._notice_at = self._began + notice_after_s

    def slice_s(self) -> float:
        """Return how many seconds to block before checking the limits again."""
        left_s = min(self._deadline, self._notice_at) - time.monotonic()
        return max(0.0, min(left_s, _LONGEST_SLICE_S))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    @property
    def is_over(self) -> bool:
        """True once the timeout has passed."""
        return time.monotonic() >= self._deadline

    def notice_is_due(self) -> bool:
        """Return True if the wait should be explained now; the next pause is longer."""
        now = time.monotonic()
        if now < self._notice_at:
            return False
        self._pause_s = min(2 * self._pause_s, LONGEST_NOTICE_S)
        self._notice_at = now + self._pause_s
        return True
