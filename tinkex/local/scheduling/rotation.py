"""The order in which the engine thread serves what has work to do.

No thread of its own; thread-safe, but for the methods that end in ``_locked``.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Callable, Deque, Optional, Union

from tinkex.local.scheduling.batches import SamplerLane
from tinkex.local.scheduling.lanes import Lane
from tinkex.local.settings import SamplingLimits

AnyLane = Union[Lane, SamplerLane]


class Rotation:
    """The lanes that have work, served in turn, and the engine thread's other duties.

    Args:
        limits: how sampling shares the engine.
        clock: monotonic seconds.

    Attributes:
        lock: guards this and all lanes, but for the live batches of samplers.  Never held while
            the engine works.
    """

    def __init__(self, limits: SamplingLimits, clock: Callable[[], float]) -> None:
        self.lock = threading.Lock()
        # Only the engine thread waits for it.
        self._wake = threading.Condition(self.lock)
        self._limits = limits
        self._clock = clock
        self._lanes: Deque[AnyLane] = deque()
        self._served: Optional[AnyLane] = None  # by the engine thread; not in _lanes meanwhile
        self._housekeeping_wanted = False
        self._closing = False

    @property
    def is_closing(self) -> bool:
        """True once `close` was called."""
        return self._closing  # a single read, and never unset: needs no lock

    def close(self) -> None:
        """End the work: wake the engine thread, which gets no lane any more."""
        with self.lock:
            self._closing = True
            self._wake.notify()

    def request_housekeeping(self) -> None:
        """Have the engine thread do its housekeeping soon."""
        with self.lock:
            self._housekeeping_wanted = True
            self._wake.notify()

    def housekeeping_requested(self) -> bool:
        """True once after `request_housekeeping`."""
        with self.lock:
            wanted, self._housekeeping_wanted = self._housekeeping_wanted, False
            return wanted

    def add_locked(self, lane: AnyLane) -> None:
        """Add a lane that has something to do, unless it is there; wake the engine thread."""
        # A lane that is being served is put back by give_back_locked, with what was added now.
        if lane is not self._served and lane not in self._lanes:
            self._lanes.append(lane)
        self.wake_locked()

    def wake_locked(self) -> None:
        """Wake the engine thread: a lane in the rotation has changed."""
        self._wake.notify()

    def next_lane(
        self, due: float, runnable: Callable[[SamplerLane, float], bool]
    ) -> Optional[AnyLane]:
        """Take the next lane that can be served; None after waiting, perhaps until *due*.

        The lane is the engine thread's until `give_back_locked`.
        """
        with self.lock:
            # Checked under the lock, as _housekeeping_wanted is below.  Otherwise a notification
            # that comes just before the wait would be lost, and the thread would sleep until *due*.
            if self._closing:
                return None
            now = self._clock()
            wait_until = due
            # Each is looked at once.  A run in the rotation has work; a sampler may have to wait,
            # for more requests to gather or for room in the cache.
            for _ in range(len(self._lanes)):
                lane = self._lanes.popleft()
                if isinstance(lane, Lane) or runnable(lane, now):
                    self._served = lane
                    return lane
                self._lanes.append(lane)
                if lane.queued:
                    starts_at = lane.starts_at(self._limits)
                    if starts_at > now:  # else it waits for another batch to end
                        wait_until = min(wait_until, starts_at)
            # One wait, however it ends: the caller first does the housekeeping if it is due, and
            # asks again.
            if not self._housekeeping_wanted:
                self._wake.wait(max(0.0, wait_until - now))
            return None

    def give_back_locked(self, lane: Optional[AnyLane]) -> None:
        """Put the lane that was served behind the others, if it has more to do."""
        # Under one lock with the check below: work that came while the lane was served, when
        # `add_locked` left it out, is seen by `has_work`.
        self._served = None
        if lane is not None and lane.has_work:
            self._lanes.append(lane)
