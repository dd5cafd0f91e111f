"""AdaptivePool: threads for short requests; the farther away the server, the more threads."""

from __future__ import annotations

import collections
import contextlib
import math
import threading
import time
from typing import Deque, Optional, Sequence

from tinkex._runtime.worker_pool import Task, WorkerPool, WorkerPools
from tinkex.errors import ClientClosedError

#: The fewest and the most threads.
MIN_THREADS, MAX_THREADS = 2, 64
#: The number of threads is decided again after this many requests.
DECIDE_EVERY = 16
#: The fastest request in a period of this many seconds shows how far away the server is.  It is one
#: that did not wait for the interpreter, and such requests are rare while a program is busy.
RECENT_S = 10.0
#: A pool is busy if its threads together use more than this share of one processor.
_BUSY = 0.4
_IDLE_S = 5.0


class AdaptivePool:
    """Runs tasks in the order given, on a few threads of its own.

    The pool has one thread for each millisecond that the fastest request takes, so that it can send
    a thousand requests a second; but only a few threads while they are busy, since more would just
    wait for the interpreter.  Thread-safe.  Tasks handle their own exceptions.

    Attributes:
        pool: the threads.
    """

    def __init__(self, pools: WorkerPools, name: str) -> None:
        self.pool: WorkerPool = pools.make(name, MIN_THREADS, _IDLE_S)
        # Guards what follows.  Never held while a task runs.
        self._lock = threading.Lock()
        self._waiting: Deque[Task] = collections.deque()  # not begun yet
        self._at_work = 0  # threads of the pool that run `_work`
        self._fastest_s = self._fastest_before_s = math.inf  # in this period and the previous one
        self._period_began = self._counted_from = time.monotonic()
        self._count = 0  # requests since the last decision
        self._cpu_s = 0.0  # CPU time of these requests

    @property
    def waiting(self) -> int:
        """How many tasks have not begun."""
        return len(self._waiting)  # atomic

    def put(self, tasks: Sequence[Task]) -> None:
        """Queue *tasks*; does not block.

        Raises:
            ClientClosedError: the pool was closed; some of the tasks may not run.
        """
        with self._lock:
            self._waiting.extend(tasks)
        self._call(len(tasks))

    def run_waiting(self) -> None:
        """Run queued tasks until none are left.  For a thread outside the pool that helps out."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                task = self._waiting.popleft()
            self._run_one(task)

    def _call(self, most: int) -> None:
        """Wake or start up to *most* threads, each of which runs tasks until none are left."""
        for _ in range(min(most, self.pool.cap)):
            self.pool.submit(self._work)

    def _work(self) -> None:
        """Run queued tasks until none are left, or there are too many threads."""
        with self._lock:
            self._at_work += 1
        while True:
            with self._lock:  # atomic: a `_call` after this starts another thread
                if not self._waiting or self._at_work > self.pool.cap:
                    self._at_work -= 1
                    return
                task = self._waiting.popleft()
            self._run_one(task)

    def _run_one(self, task: Task) -> None:
        # thread_time is the CPU time of this thread alone.  Summed over the pool's threads, it
        # shows how busy the pool is, whatever the rest of the program does.
        began, cpu_s = time.monotonic(), time.thread_time()
        task()
        wanted = self._note(began, time.monotonic(), time.thread_time() - cpu_s)
        before = self.pool.cap
        if wanted is not None and wanted != before:
            self.pool.resize(wanted)
            with contextlib.suppress(ClientClosedError):  # waiting tasks will not run then
                self._call(min(wanted - before, len(self._waiting)))

    def clear(self) -> None:
        """Drop the tasks that have not begun.  Does not block."""
        with self._lock:
            self._waiting.clear()

    def _note(self, began: float, now: float, cpu_s: float) -> Optional[int]:
        """Count a request; now and then, return how many threads there should be."""
        with self._lock:
            # The fastest request of two periods counts: the current one may have seen few requests.
            if now - self._period_began > RECENT_S:
                self._fastest_before_s, self._fastest_s = self._fastest_s, math.inf
                self._period_began = now
            self._fastest_s = min(self._fastest_s, now - began)
            self._cpu_s += cpu_s
            self._count += 1
            if self._count < DECIDE_EVERY:
                return None
            busy = self._cpu_s > _BUSY * (now - self._counted_from)
            self._count, self._cpu_s, self._counted_from = 0, 0.0, now
            away_s = min(self._fastest_s, self._fastest_before_s)
            return MIN_THREADS if busy else min(MAX_THREADS, max(MIN_THREADS, int(1e3 * away_s)))
