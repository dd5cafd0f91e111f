"""Crew: threads that do short requests, as many as the way to the server is long."""

from __future__ import annotations

import collections
import contextlib
import math
import threading
import time
from typing import Callable, Deque, Generic, Optional, Sequence, TypeVar

from tinkex._runtime.worker_pool import WorkerPool
from tinkex.errors import ClientClosedError

T = TypeVar("T")

#: Threads: at least, and at most.
FEWEST, MOST = 2, 64
#: So many requests decide how many there are for the next ones.
FEW = 16
#: The fastest request of this long tells how far the server is, in seconds; it takes one that did
#: not have to wait for the interpreter, and while a program is busy there are few of them.
RECENT_S = 10.0
#: A crew whose threads take so much of one processor together is busy.
_BUSY = 0.4
_IDLE_S = 5.0


class Crew(Generic[T]):
    """Runs *run* with each item it is given, in their order, on a few threads of its own.

    One thread for each millisecond that a request takes at least, so that a thousand can be made
    in a second.  Unless the threads are busy themselves: more would only wait for the interpreter.
    Thread-safe.  *run* handles its own exceptions.

    Attributes:
        pool: the threads.
    """

    def __init__(self, name: str, run: Callable[[T], None]) -> None:
        self.pool = WorkerPool(name, FEWEST, _IDLE_S)
        self._run = run
        # Guards what follows.  Never held while something runs.
        self._lock = threading.Lock()
        self._waiting: Deque[T] = collections.deque()  # what nobody has begun
        self._at_work = 0  # threads of the crew
        self._fastest_s = self._fastest_before_s = math.inf  # in this period, and the one before
        self._period_began = self._few_began = time.monotonic()
        self._number = 0  # of the few requests since the last decision
        self._cpu_s = 0.0  # which they took

    @property
    def waiting(self) -> int:
        """How many items nobody has begun."""
        return len(self._waiting)

    def put(self, items: Sequence[T]) -> None:
        """Have *items* run; returns at once.

        Raises:
            ClientClosedError: they may not be run.
        """
        with self._lock:
            self._waiting.extend(items)
        self._call(len(items))

    def run_waiting(self) -> None:
        """Run what waits until nothing does.  For threads that are not of the crew: they help."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                item = self._waiting.popleft()
            self._run_one(item)

    def _call(self, most: int) -> None:
        """Wake, or start, threads; whoever comes runs all that wait, so there need be few calls."""
        for _ in range(min(most, self.pool.cap)):
            self.pool.submit(self._work)

    def _work(self) -> None:
        """Run what waits, until nothing does, or this is one thread too many."""
        with self._lock:
            self._at_work += 1
        while True:
            with self._lock:  # decided at once: whoever is called after that finds us gone
                if not self._waiting or self._at_work > self.pool.cap:
                    self._at_work -= 1
                    return
                item = self._waiting.popleft()
            self._run_one(item)

    def _run_one(self, item: T) -> None:
        began, cpu_s = time.monotonic(), time.thread_time()
        self._run(item)
        wanted = self._note(began, time.monotonic(), time.thread_time() - cpu_s)
        before = self.pool.cap
        if wanted is not None and wanted != before:
            self.pool.resize(wanted)
            with contextlib.suppress(ClientClosedError):
                self._call(min(wanted - before, len(self._waiting)))

    def close(self) -> None:
        """Let the threads end; what waits is dropped.  Returns at once."""
        self.pool.close()
        with self._lock:
            self._waiting.clear()

    def _note(self, began: float, now: float, cpu_s: float) -> Optional[int]:
        """Note a request; now and then, return how many threads there should be."""
        with self._lock:
            if now - self._period_began > RECENT_S:
                self._fastest_before_s, self._fastest_s = self._fastest_s, math.inf
                self._period_began = now
            self._fastest_s = min(self._fastest_s, now - began)
            self._cpu_s += cpu_s
            self._number += 1
            if self._number < FEW:
                return None
            busy = self._cpu_s > _BUSY * (now - self._few_began)
            self._number, self._cpu_s, self._few_began = 0, 0.0, now
            away_s = min(self._fastest_s, self._fastest_before_s)
            return FEWEST if busy else min(MOST, max(FEWEST, int(1e3 * away_s)))
