"""The threads that respond to HTTP requests: as many as are needed, up to a cap.

waitress has a fixed pool, in which a few held polls would starve everything else.  Here a thread
is added whenever a request finds none idle, and ends after half a minute without work.  Owned by
LocalServer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any, Deque, List

_log = logging.getLogger(__name__)


class HttpThreads:
    """An elastic pool with the interface of waitress's task dispatcher.  Thread-safe.

    Args:
        limit: most threads; further requests wait.
        idle_s: a thread without work for this long ends.
    """

    def __init__(self, limit: int, idle_s: float = 30.0) -> None:
        self._limit = limit
        self._idle_s = idle_s
        # Guards everything below.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._tasks: Deque[Any] = deque()
        self._threads: List[threading.Thread] = []
        self._idle = 0
        self._made = 0
        self._closing = False

    def add_task(self, task: Any) -> None:
        """Have *task* (waitress's, with ``service`` and ``cancel``) run soon."""
        with self._wake:
            closing = self._closing
            if not closing:
                self._tasks.append(task)
                if self._idle >= len(self._tasks):
                    self._wake.notify()
                elif len(self._threads) < self._limit:
                    self._add_thread_locked()
        if closing:
            task.cancel()

    def _add_thread_locked(self) -> None:
        self._made += 1
        thread = threading.Thread(target=self._work, name=f"tinkex-http-{self._made}", daemon=True)
        try:
            # Under the lock, so that shutdown only ever sees threads it can join.
            thread.start()
        except RuntimeError:  # the system has no more threads
            if not self._threads:
                raise
            return  # the existing threads take the task
        self._threads.append(thread)

    def set_thread_count(self, count: int) -> None:
        """Do nothing: waitress asks for its fixed number of threads here."""

    def shutdown(self, cancel_pending: bool = True, timeout: float = 5) -> bool:
        """End all threads; return False if one is still busy after *timeout* seconds."""
        with self._wake:
            self._closing = True
            dropped = list(self._tasks) if cancel_pending else []
            self._tasks = deque(() if cancel_pending else self._tasks)
            threads = list(self._threads)
            self._wake.notify_all()
        for task in dropped:
            task.cancel()
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        busy = [thread.name for thread in threads if thread.is_alive()]
        if busy:
            _log.warning("still busy after %.1f s: %s", timeout, ", ".join(busy))
        return not busy

    def _work(self) -> None:
        while True:
            with self._wake:
                if not self._tasks and not self._closing:
                    self._idle += 1
                    self._wake.wait(self._idle_s)
                    self._idle -= 1
                if not self._tasks:
                    # Closing, idle for long, or another thread was faster: fewer are enough.
                    self._threads.remove(threading.current_thread())
                    return
                task = self._tasks.popleft()
            try:
                task.service()
            except Exception:
                # waitress 3.0 fails (no `path`) on a client that sent nonsense and hung up.
                if getattr(task, "connected", True):
                    _log.exception("an HTTP request failed")
                else:
                    _log.debug("a client hung up", exc_info=True)
