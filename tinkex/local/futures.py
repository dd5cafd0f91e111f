"""The server's futures: request id -> pending, a result, or a failure.

The scheduler completes them, HTTP threads wait for them.  No thread of its own.  Each pending
future that somebody waits for has its own Event, so that a completion wakes only its waiters.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from typing import Callable, Dict, Optional, Union


@dataclasses.dataclass(frozen=True)
class Success:
    """The work was done; *value* is a ForwardBackwardOutput, a SampleResponse or a JSON object."""

    value: object


@dataclasses.dataclass(frozen=True)
class Failure:
    """The work failed; *category* is ``"user"`` or ``"server"``."""

    message: str
    category: str


Outcome = Union[Success, Failure]


@dataclasses.dataclass
class _Entry:
    owner: str  # the model or sampler whose queue it is in
    seq_id: int
    outcome: Optional[Outcome] = None
    done: Optional[threading.Event] = None
    finished_at: float = 0.0
    fetched_at: Optional[float] = None
    fetched_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A future that is still pending: it stands at *seq_id* in the queue of *owner*."""

    owner: str
    seq_id: int


class FutureTable:
    """All futures of the server.  Thread-safe.

    Args:
        keep_fetched_s: a result may be fetched again for this long (a lost answer is asked for
            again within seconds).
        keep_unfetched_s: a result nobody asks for is dropped after this long.
        max_finished: at most this many results are kept, the oldest dropped first.
        max_fetched_bytes: at most this many encoded bytes of fetched results are kept.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        keep_fetched_s: float = 120.0,
        keep_unfetched_s: float = 3600.0,
        max_finished: int = 20_000,
        max_fetched_bytes: int = 256 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep_fetched_s = keep_fetched_s
        self._keep_unfetched_s = keep_unfetched_s
        self._max_finished = max_finished
        self._max_fetched_bytes = max_fetched_bytes
        self._clock = clock
        # Guards everything below.  Nothing is called and nobody waits while it is held.
        self._lock = threading.Lock()
        self._pending: Dict[str, _Entry] = {}
        self._finished: OrderedDict[str, _Entry] = OrderedDict()  # by time of completion
        self._fetched: OrderedDict[str, _Entry] = OrderedDict()  # by time of first fetch
        self._fetched_bytes = 0
        self._closing = False

    def create(self, request_id: str, owner: str, seq_id: int) -> None:
        """Add a pending future."""
        with self._lock:
            self._pending[request_id] = _Entry(owner, seq_id)

    def complete(self, request_id: str, outcome: Outcome) -> None:
        """Settle a future and wake its waiters; nothing happens if it was settled before."""
        with self._lock:
            entry = self._pending.pop(request_id, None)
            if entry is None:
                return
            entry.outcome = outcome
            entry.finished_at = self._clock()
            self._finished[request_id] = entry
            while len(self._finished) > self._max_finished:
                self._drop_locked(next(iter(self._finished)))
            done = entry.done
        if done is not None:
            done.set()

    def wait(self, request_id: str, timeout_s: float) -> Union[Waiting, Outcome, None]:
        """Return the outcome, blocking for at most *timeout_s* (or until close).

        Returns Waiting if it is still pending then, and None if there is no such future.
        """
        with self._lock:
            entry = self._pending.get(request_id)
            if entry is None:
                finished = self._finished.get(request_id)
                return None if finished is None else finished.outcome
            if timeout_s <= 0 or self._closing:
                return Waiting(entry.owner, entry.seq_id)
            if entry.done is None:
                entry.done = threading.Event()
            done = entry.done
        done.wait(timeout_s)
        # Written before the Event is set, and never changed again.
        return entry.outcome or Waiting(entry.owner, entry.seq_id)

    def fetched(self, request_id: str, size: int) -> None:
        """Note that the result was handed out in *size* bytes."""
        with self._lock:
            entry = self._finished.get(request_id)
            if entry is None or entry.fetched_at is not None:
                return
            entry.fetched_at = self._clock()
            entry.fetched_bytes = size
            self._fetched[request_id] = entry
            self._fetched_bytes += size
            # The newest stays whatever its size: its answer may still get lost.
            while self._fetched_bytes > self._max_fetched_bytes and len(self._fetched) > 1:
                self._drop_locked(next(iter(self._fetched)))

    def sweep(self, now: float) -> None:
        """Drop results that have been kept long enough."""
        with self._lock:
            for request_id, entry in list(self._fetched.items()):
                if entry.fetched_at is None or now < entry.fetched_at + self._keep_fetched_s:
                    break
                self._drop_locked(request_id)
            for request_id, entry in list(self._finished.items()):
                if now < entry.finished_at + self._keep_unfetched_s:
                    break
                self._drop_locked(request_id)

    def close(self) -> None:
        """Release every waiter; from now on nobody is made to wait."""
        with self._lock:
            self._closing = True
            events = [entry.done for entry in self._pending.values() if entry.done is not None]
        for event in events:
            event.set()

    def _drop_locked(self, request_id: str) -> None:
        entry = self._finished.pop(request_id, None)
        if entry is not None and self._fetched.pop(request_id, None) is not None:
            self._fetched_bytes -= entry.fetched_bytes
