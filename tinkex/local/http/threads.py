"""HttpThreads: the threads that respond to HTTP requests, as many as are needed, up to a limit.

The pool of waitress has a fixed size, and a few held polls would starve all other requests in it.
Owned by LocalServer.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import Any, Callable, Set, TypeVar

from tinkex._runtime.worker_pool import WorkerPool
from tinkex.errors import ClientClosedError
from tinkex.local.errors import HTTPError

T = TypeVar("T")

_log = logging.getLogger(__name__)


class HttpThreads:
    """A pool of threads with the interface of waitress's task dispatcher.  Thread-safe.

    Args:
        limit: most threads; further requests wait.
        idle_s: a thread without work for this long ends.
    """

    def __init__(self, limit: int, idle_s: float = 30.0) -> None:
        self._pool = WorkerPool("tinkex-http", limit, idle_s)
        # Tasks that have not begun.  A closed pool drops them, but waitress needs each cancelled.
        self._waiting: Set[Any] = set()
        self._is_closed = False  # written once

    def add_task(self, task: Any) -> None:
        """Queue *task*, a task of waitress with ``service`` and ``cancel``."""
        # Before it is submitted, since a thread may take it at once.
        self._waiting.add(task)
        try:
            self._pool.submit(functools.partial(self._run, task))
        except ClientClosedError:
            self._cancel(task)

    @property
    def is_busy(self) -> bool:
        """True while a request is being served, or waits for a thread."""
        return self._pool.is_busy

    def set_thread_count(self, count: int) -> None:
        """Do nothing: waitress asks for its fixed number of threads here."""

    def shutdown(self, cancel_pending: bool = True, timeout: float = 5) -> bool:
        """End all threads; return False if one is still busy after *timeout* seconds."""
        self._is_closed = True
        if cancel_pending:
            # The pool first: once it is closed, `add_task` cancels every task that arrives.
            self._pool.close()
            for task in list(self._waiting):
                self._cancel(task)
        else:
            self._pool.drain()
        busy = self._pool.join(time.monotonic() + timeout)
        if busy:
            _log.warning("still busy after %.1f s: %s", timeout, ", ".join(busy))
        return not busy

    def _claim(self, task: Any) -> bool:
        """Return True to the first caller, which then runs or cancels the task."""
        # Removing from a set is atomic.
        try:
            self._waiting.remove(task)
        except KeyError:
            return False
        return True

    def _cancel(self, task: Any) -> None:
        if self._claim(task):
            task.cancel()

    def _run(self, task: Any) -> None:
        if not self._claim(task):
            return
        try:
            task.service()
        except Exception:
            # waitress 3.0 fails (no `path`) on a client that sent nonsense and hung up.  A request
            # that outlives the server finds its sockets closed.
            if self._is_closed or not getattr(task, "connected", True):
                _log.debug("a client hung up, or the server was closed", exc_info=True)
            else:
                _log.exception("an HTTP request failed")


class HeldPolls:
    """Bounds how many polls are held, since each occupies an HTTP thread.  Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = threading.BoundedSemaphore(limit)  # never waited for

    def hold(self, wait: Callable[[], T]) -> T:
        """Return what *wait* returns; HTTPError 429 if too many polls are held already."""
        self.acquire()
        try:
            return wait()
        finally:
            self.release()

    def acquire(self) -> None:
        """Count one more held poll; HTTPError 429 if too many are held already."""
        if not self._free.acquire(blocking=False):
            # After a 429 clients pause; after try_again they would ask again at once.
            raise HTTPError(
                429, f"{self._limit} requests are held already; ask again", retry_after_s=1.0
            )

    def release(self) -> None:
        """Count one held poll less."""
        self._free.release()
