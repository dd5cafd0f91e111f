"""Crew: a worker pool for short requests, as wide as the way to the server is long."""

from __future__ import annotations

import math
import threading
import time
from typing import Callable, Optional

from tinkex.flow.scheduler import WorkerPool

#: Threads: at least, and at most.
FEWEST, MOST = 2, 64
#: So many requests decide how many there are for the next ones.
FEW = 16
#: A process that takes so much of one processor is busy.
_BUSY = 0.4
_IDLE_S = 5.0


class Crew:
    """Threads for short requests: one for each millisecond that a request takes at least.

    Unless it is this process that is busy: more threads would then only wait for the interpreter.
    """

    def __init__(self, name: str) -> None:
        self.pool = WorkerPool(name, FEWEST, _IDLE_S)
        # Guards what follows: of the requests since the last change, a few.
        self._lock = threading.Lock()
        self._number = 0
        self._fastest_s = math.inf
        self._since_s, self._cpu_s = time.monotonic(), time.process_time()

    def submit(self, task: Callable[[], None]) -> None:
        """Queue *task*; ClientClosedError if it will not run."""
        self.pool.submit(lambda: self._run(task))

    def _run(self, task: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            task()
        finally:
            wanted = self._note(began, time.monotonic(), time.process_time())
            if wanted is not None and (wanted > FEWEST or self.pool.cap > FEWEST):
                self.pool.resize(wanted)

    def _note(self, began: float, now: float, cpu_s: float) -> Optional[int]:
        """Note a request; now and then, return how many threads there should be."""
        with self._lock:
            self._number += 1
            self._fastest_s = min(self._fastest_s, now - began)
            if self._number < FEW:
                return None
            busy = cpu_s - self._cpu_s > _BUSY * (now - self._since_s)
            wanted = FEWEST if busy else min(MOST, max(FEWEST, int(1e3 * self._fastest_s)))
            self._number, self._fastest_s = 0, math.inf
            self._since_s, self._cpu_s = now, cpu_s
            return wanted
