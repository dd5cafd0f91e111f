"""Limits: how much may be in flight at the same time, and which threads must wait.

A `Quota` limits bytes or requests in flight, `UnreadLimit` the unread futures, and a `RateLimiter`
the requests after a 429.  None of them has a thread: they block the caller's.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import threading
from typing import Callable, Deque, Iterator, Optional, Protocol, Set

from tinkex._runtime.clock import SYSTEM_CLOCK, Clock, LongWait
from tinkex._runtime.inbox import Inbox
from tinkex.errors import BackpressureError, ClientClosedError

logger = logging.getLogger(__name__)

#: How often, in seconds, a waiting thread checks whether to stop; `wake` makes it check now.
_CHECK_INTERVAL_S = 1.0

#: Released places are counted once there are this many, or when no place is left.
_COUNT_AT = 256

#: After a back-off, requests go out a few at a time for this long, in seconds ...
RECENT_S = 10.0
#: ... and this many at a time.
MAX_AFTER_429 = 10


class Waits(Protocol):
    """A future that shows what it is waiting for."""

    waiting_for: Optional[Callable[[], str]]


class _Waiter:
    """One waiting caller in the queue of a quota."""

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.granted = False
        self.woken = threading.Event()


class Quota:
    """A limit on what is in use at the same time; further callers wait, first come, first served.

    An amount is granted whenever no more than *size* is in use (docs/protocol.md, "Back-pressure"):
    even one larger than *size* passes, and the next caller waits for its release.  Thread-safe.

    Args:
        name: what is counted, for messages.
        size: the limit; may be changed at any time.
        unit: formats an amount for messages.
    """

    def __init__(self, name: str, size: int, unit: Callable[[int], str]) -> None:
        self.size = size
        self._name = name
        self._unit = unit
        # Guards what follows, and the waiters in the queue.
        self._lock = threading.Lock()
        self._used = 0
        self._queue: Deque[_Waiter] = collections.deque()

    def acquire(
        self, amount: int, stopped: Callable[[], bool], future: Optional[Waits] = None
    ) -> None:
        """Take *amount*; blocks until no more than *size* is in use and it is this caller's turn.

        *future* shows the wait in its status.  Give the amount back with `release`.

        Raises:
            ClientClosedError: *stopped* returned True; it is checked once a second and at `wake`.
        """
        with self._lock:
            # Don't overtake waiting callers: a flow of small requests would starve a large one.
            if not self._queue and self._used <= self.size:
                self._used += amount
                return
        # A separate method, so that its name in a stack dump shows what the thread is waiting for.
        self._wait_for_quota(amount, stopped, future)

    def release(self, amount: int) -> None:
        """Give *amount* back.  Does not block."""
        with self._lock:
            self._used -= amount
            if self._queue:
                self._grant_locked()

    @contextlib.contextmanager
    def holding(
        self, amount: int, stopped: Callable[[], bool], future: Optional[Waits] = None
    ) -> Iterator[None]:
        """Hold *amount* inside the block; see `acquire`."""
        self.acquire(amount, stopped, future)
        try:
            yield
        finally:
            self.release(amount)

    def wake(self) -> None:
        """Have every waiting thread check immediately whether it should stop."""
        with self._lock:
            for waiter in self._queue:
                waiter.woken.set()

    def describe(self) -> str:
        """Return in words how much is in use."""
        return f"{self._name}: {self._unit(self._used)} of {self._unit(self.size)} in flight"

    def _wait_for_quota(
        self, amount: int, stopped: Callable[[], bool], future: Optional[Waits]
    ) -> None:
        waiter = _Waiter(amount)
        try:
            with self._lock:
                self._queue.append(waiter)
                # The last release may have come since `acquire` looked: no other would grant this.
                self._grant_locked()
            if future is not None:
                future.waiting_for = self.describe
            while not waiter.granted:
                if stopped():
                    raise ClientClosedError(f"closed or cancelled during a wait ({self._name})")
                waiter.woken.wait(_CHECK_INTERVAL_S)
                # Only `wake` sets the event without a grant.  If a grant follows this check, the
                # loop sees it: it looks at `granted` before it waits again.
                if not waiter.granted:
                    waiter.woken.clear()
        except BaseException:  # Ctrl-C, too: an amount granted meanwhile would leak
            self._leave_queue(waiter)
            raise
        finally:
            if future is not None:
                future.waiting_for = None

    def _leave_queue(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter.granted:
                self._used -= waiter.amount
                self._grant_locked()
            elif waiter in self._queue:
                self._queue.remove(waiter)

    def _grant_locked(self) -> None:
        while self._queue and self._used <= self.size:
            waiter = self._queue.popleft()
            self._used += waiter.amount
            waiter.granted = True
            waiter.woken.set()


def megabytes(amount: int) -> str:
    """Format a number of bytes, e.g. ``"3.1 MB"``."""
    return f"{amount / 1e6:.1f} MB"


class UnreadLimit:
    """Limits the unread futures of a client.  Thread-safe.

    A future counts as read after `result`, `exception` or a callback, or once it is
    garbage-collected.

    A thread that waits here cannot read, so a program with no other thread waits forever.  This
    cannot be detected, since another thread may still start to read; the log warns of it.

    Args:
        limit: once this many are unread, `acquire` waits, or raises if *raises*; None means no
            limit.
        closing: ends every wait when set.
        notice_after_s: a wait longer than this, in seconds, is logged.
    """

    def __init__(
        self, limit: Optional[int], *, raises: bool, closing: threading.Event, notice_after_s: float
    ) -> None:
        self._limit = limit
        self._raises = raises
        self._closing = closing
        self._notice_after_s = notice_after_s
        # Released places.  A queue and not a counter with a lock: finalizers release places, and a
        # finalizer may run in a thread that already holds the lock.
        self._released: Inbox[None] = Inbox()
        # Guards _submitters and _count, which includes the places in _released.
        self._lock = threading.Lock()
        self._count = 0
        # The first two threads that took a place: all that matters is whether there is more than
        # one.  Not their ids, which are reused.
        self._submitters: Set[threading.Thread] = set()

    @property
    def counts(self) -> bool:
        """False if there is no limit."""
        return self._limit is not None

    def acquire(self, what: str) -> None:
        """Take a place for the future of *what*; blocks while no place is free.

        Raises:
            BackpressureError: no place is free, and *raises* is set.
            ClientClosedError: the client was closed during the wait.
        """
        if self._limit is None:
            return
        with self._lock:
            if self._count >= self._limit or self._released.qsize() >= _COUNT_AT:
                self._count_released_locked()
            if len(self._submitters) < 2:
                self._submitters.add(threading.current_thread())
            if self._count < self._limit:
                self._count += 1
                return
        if self._raises:
            raise BackpressureError(f"{what} was not submitted: {self._full()}", hint=_READ_THEM)
        self._wait_for_reads(what)

    def release(self) -> None:
        """Give a place back.  Safe in finalizers: takes no lock."""
        self._released.put(None)

    def wake(self) -> None:
        """Make waiting threads check whether the client is closing."""
        self._released.put(None)

    def _count_released_locked(self) -> None:
        try:
            while True:
                self._released.get_nowait()
                self._count -= 1
        except queue.Empty:
            pass

    def _wait_for_reads(self, what: str) -> None:
        wait = LongWait(self._notice_after_s)
        while True:
            try:
                self._released.get(timeout=min(wait.slice_s(), _CHECK_INTERVAL_S))
            except queue.Empty:
                pass
            else:
                if not self._closing.is_set():
                    return  # this thread takes over the place of a future that was read
                self._released.put(None)  # `wake` puts one item for all threads: pass it on
            if self._closing.is_set():
                raise ClientClosedError(f"{what}: the client was closed during a wait")
            if wait.notice_is_due():
                logger.warning(
                    "%s has waited for %.0f s: %s. %s%s",
                    what,
                    wait.elapsed_s,
                    self._full(),
                    self._deadlock_warning(),
                    _READ_THEM,
                )

    def _deadlock_warning(self) -> str:
        if len(self._submitters) > 1:
            return ""
        return (
            f"Only this thread, {threading.current_thread().name}, has submitted requests: unless "
            "another thread reads their results, it waits forever. "
        )

    def _full(self) -> str:
        return f"{self._limit} results are unread (max_unread = {self._limit})"


_READ_THEM = (
    "Read some with result() before you submit more (sample_many does), drop futures that you do "
    "not need, or set a larger max_unread; on_backpressure='raise' raises instead."
)


class RateLimiter:
    """Throttles submissions after a 429, for all clients of a server and key.  Thread-safe.

    For a while after the back-off, requests go out a few at a time (docs/protocol.md,
    "Back-pressure"): otherwise all waiting requests would reach the server at the same moment.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        # Guards writes to _not_before.  Each request reads it without the lock: a request that
        # reads the old value goes out as it would have a moment earlier.
        self._lock = threading.Lock()
        self._not_before = float("-inf")
        # One less, because a quota still grants a request while exactly its size is in use.
        self._quota = Quota("requests after a 429", MAX_AFTER_429 - 1, unit=str)

    def back_off(self, delay_s: float) -> None:
        """Pause submissions for *delay_s* seconds; an earlier back-off that ends later stands."""
        until = self._clock.monotonic() + delay_s
        with self._lock:
            self._not_before = max(self._not_before, until)

    def wait_s(self) -> float:
        """Seconds until a submission may go out; 0 if now.  Does not block."""
        return max(0.0, self._not_before - self._clock.monotonic())

    @property
    def throttled(self) -> bool:
        """True during a back-off and shortly after it: use `acquire` then.  Does not block."""
        return self._clock.monotonic() < self._not_before + RECENT_S

    def acquire(self, pause: Callable[[float], None], stopped: Callable[[], bool]) -> None:
        """Wait for the end of the back-off and take one of MAX_AFTER_429 places; see `release`.

        *pause* waits for a number of seconds and raises if *stopped*, which is checked regularly.
        """
        while True:
            pause(self.wait_s())
            self._quota.acquire(1, stopped)
            if self.wait_s() <= 0:
                return
            self._quota.release(1)  # there was another 429 during the wait for the place

    def release(self) -> None:
        """Give the place back.  Does not block."""
        self._quota.release(1)

    def wake(self) -> None:
        """Make threads that wait for a place check whether they are stopped."""
        self._quota.wake()

    def describe(self) -> Optional[str]:
        """Return in words how requests are throttled; None if they are not."""
        wait_s = self.wait_s()
        if wait_s > 0:
            return f"rate-limited by the server (429), {wait_s:.1f} s to go"
        if self.throttled:
            return f"after a 429, {MAX_AFTER_429} requests at a time"
        return None
