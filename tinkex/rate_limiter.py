"""RateLimiter: one back-off after 429 for everybody who shares a server and a key."""

from __future__ import annotations

import os
import threading
from typing import Dict, Tuple

from tinkex import lifecycle
from tinkex.clock import SYSTEM_CLOCK, Clock


class RateLimiter:
    """Holds submissions back after a 429.  Thread-safe; never blocks by itself."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        # Guards _not_before.
        self._lock = threading.Lock()
        self._not_before = 0.0

    def back_off(self, delay_s: float) -> None:
        """Let nobody submit for *delay_s* seconds from now; an earlier, longer wish stands."""
        until = self._clock.monotonic() + delay_s
        with self._lock:
            self._not_before = max(self._not_before, until)

    def wait_s(self) -> float:
        """Seconds until a submission may go out; 0 if now."""
        with self._lock:
            return max(0.0, self._not_before - self._clock.monotonic())


# Guarded by lifecycle.module_lock().  The process id keeps the child of a fork from a limiter
# whose lock may have been held when it was copied.
_limiters: Dict[Tuple[int, str, str], RateLimiter] = {}


def limiter_for(base_url: str, key_digest: str) -> RateLimiter:
    """Return the process's limiter for one server and one key."""
    with lifecycle.module_lock():
        return _limiters.setdefault((os.getpid(), base_url, key_digest), RateLimiter())
