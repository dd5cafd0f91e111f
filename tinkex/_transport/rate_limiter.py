"""RateLimiter: one back-off after 429 for everybody who shares a server and a key.

For a while after it only a few requests at a time go out (docs/protocol.md, "Back-pressure"):
otherwise all that were held back would meet the server at the same moment.
"""

from __future__ import annotations

import threading
from typing import Callable, Optional

from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex._transport.backpressure import Quota

#: For so long after a back-off ...
RECENT_S = 10.0
#: ... so many requests are sent at a time.
FEW = 10


class RateLimiter:
    """Holds submissions back after a 429.  Thread-safe."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        # Guards writes to _not_before, which is read without.
        self._lock = threading.Lock()
        self._not_before = float("-inf")
        # A quota grants while no more than the whole is in use, so this is FEW at a time.
        self._few = Quota("requests after a 429", FEW - 1, unit=str)

    def back_off(self, delay_s: float) -> None:
        """Let nobody submit for *delay_s* seconds from now; an earlier, longer wish stands."""
        until = self._clock.monotonic() + delay_s
        with self._lock:
            self._not_before = max(self._not_before, until)

    def wait_s(self) -> float:
        """Seconds until a submission may go out; 0 if now.  Does not block."""
        return max(0.0, self._not_before - self._clock.monotonic())

    @property
    def throttled(self) -> bool:
        """True during a back-off and shortly after it: then use `acquire`.  Does not block."""
        return self._clock.monotonic() < self._not_before + RECENT_S

    def acquire(self, pause: Callable[[float], None], stopped: Callable[[], bool]) -> None:
        """Wait for the end of the back-off and then, in turn, for one of few places; see `release`.

        *pause* waits so many seconds and raises if *stopped*, which is looked at now and then.
        """
        while True:
            pause(self.wait_s())
            self._few.take(1, stopped)
            if self.wait_s() <= 0:
                return
            self._few.give(1)  # there was another 429 meanwhile

    def release(self) -> None:
        """Give the place back.  Does not block."""
        self._few.give(1)

    def wake(self) -> None:
        """Have those who wait for a place look whether they are stopped."""
        self._few.wake()

    def describe(self) -> Optional[str]:
        """In words, how requests are held back; None if they are not."""
        wait_s = self.wait_s()
        if wait_s > 0:
            return f"the server has asked to wait (429), {wait_s:.1f} s to go"
        if self.throttled:
            return f"after a 429, {FEW} requests at a time"
        return None
