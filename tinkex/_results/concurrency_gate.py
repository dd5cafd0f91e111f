"""SampleGate: limits how many samples of one client are in flight; the others wait, in order."""

from __future__ import annotations

import collections
import threading
from typing import Any, Callable, Deque, Optional, Set, Tuple

from tinkex._results.pending import PendingRequest
from tinkex.futures import APIFuture

Start = Callable[[PendingRequest[Any]], None]


class SampleGate:
    """Starts requests while fewer than *limit* of them are unsettled.  Thread-safe.

    It has no thread of its own: the thread that settles one future starts the next request.

    Args:
        limit: the most requests in flight; None is no limit.
    """

    def __init__(self, limit: Optional[int]) -> None:
        self._limit = limit
        # Guards the attributes below.  Never held while a request is started.
        self._lock = threading.Lock()
        self._waiting: Deque[Tuple[PendingRequest[Any], Start]] = collections.deque()
        self._running: Set[APIFuture[Any]] = set()
        self._starting = False

    def enter(self, request: PendingRequest[Any], start: Start) -> None:
        """Call ``start(request)``, which must not block, once there is room; return immediately."""
        if self._limit is None:
            start(request)
            return
        with self._lock:
            self._waiting.append((request, start))
        self._start_some(self._limit)

    def _start_some(self, limit: int) -> None:
        # One thread at a time starts requests, in a loop: a start that fails settles its future,
        # which calls this again, and without the loop the recursion would be as deep as the queue
        # is long.
        while True:
            future: Optional[APIFuture[Any]] = None
            try:
                with self._lock:
                    # If another thread is starting a request, its loop handles any changes since.
                    if self._starting or not self._waiting or len(self._running) >= limit:
                        return
                    first, start = self._waiting[0]
                    if first.future.done():  # cancelled while it waited, or the client was closed
                        self._waiting.popleft()
                        continue
                    future, self._starting = first.future, True
                    self._running.add(future)
                    self._waiting.popleft()
                # Before the start, which may settle the future.
                future.on_settled(self._left)
                start(first)
                # A plain write is enough: if a thread still saw True and returned, the next
                # iteration of this loop does its work.
                self._starting = False
            except BaseException:  # Ctrl-C, in any call: nothing else would start or settle it
                if future is not None:
                    self._starting = False
                    future.cancel()
                    self._left(future)
                raise

    def _left(self, future: Any) -> None:
        with self._lock:
            self._running.discard(future)
        if self._limit is not None:
            self._start_some(self._limit)
