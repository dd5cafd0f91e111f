"""SampleGate: lets so many samples of one client be in flight; the others wait, in their order."""

from __future__ import annotations

import collections
import threading
from typing import Any, Callable, Deque, Optional, Set, Tuple

from tinkex.futures import APIFuture


class SampleGate:
    """Starts work while fewer than *most* of its futures are unsettled.  Thread-safe.

    No thread of its own: whoever settles a future starts the next one.
    """

    def __init__(self, most: Optional[int]) -> None:
        self._most = most
        # Guards the rest.  Never held while work is started.
        self._lock = threading.Lock()
        self._waiting: Deque[Tuple[APIFuture[Any], Callable[[], None]]] = collections.deque()
        self._running: Set[APIFuture[Any]] = set()
        self._starting = False

    def enter(self, future: APIFuture[Any], start: Callable[[], None]) -> None:
        """Call *start*, which must not block, when it is the turn of *future*; return at once."""
        if self._most is None:
            start()
            return
        with self._lock:
            self._waiting.append((future, start))
        self._start_some(self._most)

    def _start_some(self, most: int) -> None:
        # One thread starts at a time, in a loop: a start may fail, and so settle its future, and
        # call this again, as deep as the queue is long.
        while True:
            future: Optional[APIFuture[Any]] = None
            try:
                with self._lock:
                    if self._starting or not self._waiting or len(self._running) >= most:
                        return
                    first, start = self._waiting[0]
                    if first.done():  # cancelled, or closed, while it waited
                        self._waiting.popleft()
                        continue
                    future, self._starting = first, True
                    self._running.add(future)
                    self._waiting.popleft()
                future.on_settled(self._left)
                start()
                self._starting = False
            except BaseException:  # Ctrl-C, at any call: nobody would start it, or settle it
                if future is not None:
                    self._starting = False
                    future.cancel()
                    self._left(future)
                raise

    def _left(self, future: Any) -> None:
        with self._lock:
            self._running.discard(future)
        if self._most is not None:
            self._start_some(self._most)
