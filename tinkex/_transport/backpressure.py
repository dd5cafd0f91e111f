"""Back-pressure: how much of something may be under way at once, and who waits for whom.

A `Quota` is of bytes or requests in flight, `Unread` of futures that nobody has read.  No threads
of its own: who has to wait does so in its own thread, in a function whose name tells a stack dump
(``faulthandler``) what it waits for.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import threading
from typing import Callable, Deque, Iterator, Optional, Protocol, Set

from tinkex._runtime.long_wait import LongWait
from tinkex.errors import BackpressureError, ClientClosedError

logger = logging.getLogger(__name__)

#: A waiter looks so often whether it is still wanted, in seconds; closing wakes it at once.
_LOOK_S = 1.0

#: Places given back are counted when there are so many of them.
_SWEEP = 256


class Waits(Protocol):
    """What is told of a wait: a future."""

    waiting_for: Optional[Callable[[], str]]


class _Turn:
    """One place in the queue of a quota."""

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.granted = False
        self.woken = threading.Event()


class Quota:
    """So much may be in use at once; who asks for more waits, first come, first served.

    Something is granted while no more than the whole is in use (docs/protocol.md, "Back-pressure"):
    so one piece that is larger than the whole still passes, and the next one waits for it.
    Thread-safe.

    Args:
        name: of what is counted, for messages.
        size: the whole; may be changed at any time.
        unit: writes an amount in words.
    """

    def __init__(self, name: str, size: int, unit: Callable[[int], str]) -> None:
        self.size = size
        self._name = name
        self._unit = unit
        # Guards the rest, and the turns in the queue.
        self._lock = threading.Lock()
        self._used = 0
        self._queue: Deque[_Turn] = collections.deque()

    def take(
        self, amount: int, stopped: Callable[[], bool], waiter: Optional[Waits] = None
    ) -> None:
        """Take *amount*; blocks until there is something left, and all before have theirs.

        *waiter* shows the wait in its status.  Give the amount back with `give`.

        Raises:
            ClientClosedError: *stopped*, which is looked at once a second and at `wake`.
        """
        with self._lock:
            if not self._queue and self._used <= self.size:
                self._used += amount
                return
        self._wait_for_quota(amount, stopped, waiter)

    def give(self, amount: int) -> None:
        """Give back what was taken.  Does not block."""
        with self._lock:
            self._used -= amount
            if self._queue:
                self._grant_locked()

    @contextlib.contextmanager
    def holding(
        self, amount: int, stopped: Callable[[], bool], waiter: Optional[Waits] = None
    ) -> Iterator[None]:
        """Hold *amount* inside; see `take`."""
        self.take(amount, stopped, waiter)
        try:
            yield
        finally:
            self.give(amount)

    def wake(self) -> None:
        """Have everybody who waits look at once whether to stop."""
        with self._lock:
            for turn in self._queue:
                turn.woken.set()

    def describe(self) -> str:
        """In words, how much of it is in use."""
        return f"{self._name}: {self._unit(self._used)} of {self._unit(self.size)} in flight"

    def _wait_for_quota(
        self, amount: int, stopped: Callable[[], bool], waiter: Optional[Waits]
    ) -> None:
        turn = _Turn(amount)
        try:
            with self._lock:
                self._queue.append(turn)
                self._grant_locked()
            if waiter is not None:
                waiter.waiting_for = self.describe
            while not turn.granted:
                if stopped():
                    raise ClientClosedError(f"closed or cancelled during a wait ({self._name})")
                turn.woken.wait(_LOOK_S)
                if not turn.granted:
                    turn.woken.clear()
        except BaseException:  # Ctrl-C too: pass on what it may have been given
            self._leave(turn)
            raise
        finally:
            if waiter is not None:
                waiter.waiting_for = None

    def _leave(self, turn: _Turn) -> None:
        with self._lock:
            if turn.granted:
                self._used -= turn.amount
                self._grant_locked()
            elif turn in self._queue:
                self._queue.remove(turn)

    def _grant_locked(self) -> None:
        while self._queue and self._used <= self.size:
            turn = self._queue.popleft()
            self._used += turn.amount
            turn.granted = True
            turn.woken.set()


def megabytes(amount: int) -> str:
    """Write a number of bytes: ``"3.1 MB"``."""
    return f"{amount / 1e6:.1f} MB"


class Unread:
    """Counts the futures that a client has given out and nobody has read yet.

    A future is read with `result`, `exception` or a callback, or when it is collected.  Readers and
    finalizers give a place back by a put into a SimpleQueue, which is safe anywhere.  Thread-safe.

    A thread that waits here cannot read, so a program that has no other one waits for ever.  That
    cannot be known, since any thread may come to read: the log tells of the danger.

    Args:
        most: at this many, `enter` waits, or raises; None counts nothing.
        raises: it raises.
        closing: ends waiting.
        notice_after_s: waiting is told in the log after so long.
    """

    def __init__(
        self, most: Optional[int], *, raises: bool, closing: threading.Event, notice_after_s: float
    ) -> None:
        self._most = most
        self._raises = raises
        self._closing = closing
        self._notice_after_s = notice_after_s
        self._left: queue.SimpleQueue[None] = queue.SimpleQueue()
        # Guards _count, which those in _left are still part of, and _submitters.
        self._lock = threading.Lock()
        self._count = 0
        # Threads that took a place; two are as many as any.  Not their ids, which are used again.
        self._submitters: Set[threading.Thread] = set()

    @property
    def counts(self) -> bool:
        """False if there is no bound."""
        return self._most is not None

    def enter(self, what: str) -> None:
        """Take a place for the future of *what*; blocks while there is none.

        Raises:
            BackpressureError: there is none, and it is to raise.
            ClientClosedError: the client was closed meanwhile.
        """
        if self._most is None:
            return
        with self._lock:
            if self._count >= self._most or self._left.qsize() >= _SWEEP:
                self._sweep_locked()
            if len(self._submitters) < 2:
                self._submitters.add(threading.current_thread())
            if self._count < self._most:
                self._count += 1
                return
        if self._raises:
            raise BackpressureError(f"{what} was not submitted: {self._full()}", hint=_READ_THEM)
        self._wait_for_reads(what)

    def leave(self) -> None:
        """Give a place back.  Safe in finalizers: takes no lock."""
        self._left.put(None)

    def wake(self) -> None:
        """Have those who wait look whether the client is closing."""
        self._left.put(None)

    def _sweep_locked(self) -> None:
        try:
            while True:
                self._left.get_nowait()
                self._count -= 1
        except queue.Empty:
            pass

    def _wait_for_reads(self, what: str) -> None:
        wait = LongWait(self._notice_after_s)
        while True:
            try:
                self._left.get(timeout=min(wait.slice_s(), _LOOK_S))
            except queue.Empty:
                pass
            else:
                if not self._closing.is_set():
                    return  # the place of one that was read; the count stays
                self._left.put(None)  # for the next who waits
            if self._closing.is_set():
                raise ClientClosedError(f"{what}: the client was closed during a wait")
            if wait.notice_is_due():
                logger.warning(
                    "%s has waited for %.0f s: %s. %s%s",
                    what,
                    wait.elapsed_s,
                    self._full(),
                    self._for_ever(),
                    _READ_THEM,
                )

    def _for_ever(self) -> str:
        if len(self._submitters) > 1:
            return ""
        return (
            f"Only this thread, {threading.current_thread().name}, has submitted any; if no other "
            "one reads them, it waits for itself, for ever. "
        )

    def _full(self) -> str:
        return f"the results of max_unread = {self._most} futures were not read"


_READ_THEM = (
    "Read some with result() before you submit more (sample_many does), drop those that are not "
    "needed, or set a larger max_unread; on_backpressure='raise' raises instead."
)
