"""Inbox: a queue that threads can wait on, and that any thread or finalizer may put into.

`queue.SimpleQueue` would do, but before Python 3.13 its ``get(timeout)`` waits forever if the
timeout is so short that it runs out inside the call.  A heartbeat thread would then sleep while the
server lets its session expire.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import time
from typing import Deque, Generic, Optional, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """A first-in, first-out queue.  Thread-safe; only `get` blocks."""

    def __init__(self) -> None:
        # A deque's methods are atomic.
        self._items: Deque[T] = collections.deque()
        # Used as a binary semaphore: released by `put`, acquired by a `get` that finds no item.  A
        # Condition would deadlock if a finalizer interrupts a thread that holds it (bpo-32576).
        self._news = threading.Lock()
        self._news.acquire()

    def put(self, item: T) -> None:
        """Add an item.  Safe in finalizers."""
        self._items.append(item)
        self._wake_one()

    def get(self, timeout: Optional[float] = None) -> T:
        """Take the oldest item, waiting up to *timeout* seconds for one; None waits forever.

        Raises:
            queue.Empty: there is none.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with contextlib.suppress(IndexError):  # another thread may be faster
                if self._items:
                    item = self._items.popleft()
                    if self._items:  # two puts at once may wake only one thread
                        self._wake_one()
                    return item
            left_s = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._news.acquire(timeout=min(left_s, threading.TIMEOUT_MAX)):
                return self.get_nowait()  # an item may have come just as the wait ended

    def get_nowait(self) -> T:
        """Take the oldest item.

        Raises:
            queue.Empty: there is none.
        """
        try:
            return self._items.popleft()
        except IndexError:
            raise queue.Empty from None

    def empty(self) -> bool:
        """Return whether there is no item at this moment."""
        return not self._items

    def qsize(self) -> int:
        """Return the number of items at this moment."""
        return len(self._items)

    def _wake_one(self) -> None:
        # If it is not locked, the thread that acquires it next will find the new item.
        if self._news.locked():
            with contextlib.suppress(RuntimeError):  # another thread has just released it
                self._news.release()
