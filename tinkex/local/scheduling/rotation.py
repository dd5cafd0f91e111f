"""Rotation: the order in which the engine thread serves runs and samplers.

Starts no thread.  Thread-safe; callers of the methods that end in ``_locked`` hold the lock.
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
        clock: returns monotonic seconds.

    Attributes:
        lock: guards this object and all lanes, except the live batches of samplers.  Never held
            while the engine works.
    """

    def __init__(self, limits: SamplingLimits, clock: Callable[[], float]) -> None:
        self.lock = threading.Lock()
        # Only the engine thread waits on this condition.
        self._wake = threading.Condition(self.lock)
        self._limits = limits
        self._clock = clock
        self._lanes: Deque[AnyLane] = deque()
        self._served: Optional[AnyLane] = None  # the lane that is being served; not in _lanes
        self._housekeeping_wanted = False
        self._closing = False

    @property
    def is_closing(self) -> bool:
        """True once `close` was called."""
        return self._closing  # no lock: a single read of a flag that is never unset

    def close(self) -> None:
        """Hand out no more lanes, and wake the engine thread."""
        with self.lock:
            self._closing = True
            self._wake.notify()

    def request_housekeeping(self) -> None:
        """Have the engine thread do its housekeeping soon."""
        with self.lock:
            self._housekeeping_wanted = True
            self._wake.notify()

    def housekeeping_requested(self) -> bool:
        """Return whether housekeeping was requested, and forget the request."""
        with self.lock:
            wanted, self._housekeeping_wanted = self._housekeeping_wanted, False
            return wanted

    def add_locked(self, lane: AnyLane) -> None:
        """Add a lane that has work, unless it is in the rotation; wake the engine thread."""
        # A lane that is being served returns by give_back_locked, which sees its new work, too.
        if lane is not self._served and lane not in self._lanes:
            self._lanes.append(lane)
        self.wake_locked()

    def wake_locked(self) -> None:
        """Wake the engine thread: a lane in the rotation has changed."""
        self._wake.notify()

    def next_lane(
        self, due: float, runnable: Callable[[SamplerLane, float], bool]
    ) -> Optional[AnyLane]:
        """Take the next lane that can be served.

        If there is none, wait for a change, until *due* at the latest, and return None.  The lane
        belongs to the engine thread until `give_back_locked`.
        """
        with self.lock:
            # Checked under the lock, as _housekeeping_wanted is below.  Otherwise a notification
            # just before the wait would be lost, and the thread would sleep until *due*.
            if self._closing:
                return None
            now = self._clock()
            wait_until = due
            # Each lane is tried once.  A run in the rotation has work; a sampler may have to wait
            # for more requests to gather, or for room in the cache.
            for _ in range(len(self._lanes)):
                lane = self._lanes.popleft()
                if isinstance(lane, Lane) or runnable(lane, now):
                    self._served = lane
                    return lane
                self._lanes.append(lane)
                if lane.queued:
                    starts_at = lane.starts_at(self._limits)
                    if starts_at > now:  # else the lane waits for another batch to end
                        wait_until = min(wait_until, starts_at)
            # Only one wait, whatever ends it: the caller does the housekeeping if it is due, then
            # calls again.
            if not self._housekeeping_wanted:
                self._wake.wait(max(0.0, wait_until - now))
            return None

    def give_back_locked(self, lane: Optional[AnyLane]) -> None:
        """Put the lane that was served behind the others, if it has more to do."""
        # Under one lock with the check of `has_work`, which sees the work that arrived while the
        # lane was served: `add_locked` did not append the lane then.
        self._served = None
        if lane is not None and lane.has_work:
            self._lanes.append(lane)
