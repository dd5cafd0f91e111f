"""Inbox: a queue that any thread, or a finalizer, puts into, and that can be waited on.

`queue.SimpleQueue` would do, but before Python 3.13 its ``get(timeout)`` waits for ever when the
timeout is so short that it ends inside the call.  A heartbeat thread would then sleep while the
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
    """Items in the order in which they were put.  Thread-safe; only `get` blocks."""

    def __init__(self) -> None:
        # Its own methods are atomic.
        self._items: Deque[T] = collections.deque()
        # A binary semaphore rather than a lock: released by `put`, acquired by a `get` that finds
        # no item.  A Condition would deadlock in a finalizer that interrupts its own thread in it
        # (bpo-32576).
        self._news = threading.Lock()
        self._news.acquire()

    def put(self, item: T) -> None:
        """Add an item.  Safe in finalizers."""
        self._items.append(item)
        self._wake_one()

    def get(self, timeout: Optional[float] = None) -> T:
        """Take the oldest item, and wait for it up to *timeout* seconds; None waits without end.

        Raises:
            queue.Empty: there is none.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with contextlib.suppress(IndexError):  # or another thread was faster
                if self._items:
                    item = self._items.popleft()
                    if self._items:  # two that came at once have woken only one thread
                        self._wake_one()
                    return item
            left_s = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._news.acquire(timeout=min(left_s, threading.TIMEOUT_MAX)):
                return self.get_nowait()  # it may have come just as the wait ended

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
        """Whether there is no item at this moment."""
        return not self._items

    def qsize(self) -> int:
        """Return the number of items at this moment."""
        return len(self._items)

    def _wake_one(self) -> None:
        # Not locked: the thread that acquires it next will find the new item.
        if self._news.locked():
            with contextlib.suppress(RuntimeError):  # another thread has just done it
                self._news.release()
