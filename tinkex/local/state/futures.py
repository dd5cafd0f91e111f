"""The server's futures: request id -> pending, a result, or a failure.

The engine thread completes most of them, HTTP threads wait for them.  Starts no thread.  Each
pending future that has waiters has its own Event, so that a completion wakes only its waiters.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple, Union

#: Number of seq_ids of one sampling client; the next block belongs to the next clone.
CLONE_BLOCK = 1_000_000_000


class Group(NamedTuple):
    """A sampling client: a sampler, and the index of the clone (docs/protocol.md, "Clones")."""

    sampler_id: str
    clone: int

    @classmethod
    def of(cls, sampler_id: str, seq_id: int) -> Group:
        """Return the group of the request *seq_id* of a sampler."""
        return cls(sampler_id, seq_id // CLONE_BLOCK)


class Completions:
    """Finished requests by group, each with an increasing index.  Not thread-safe."""

    def __init__(self) -> None:
        self._last = 0
        self._groups: Dict[Group, OrderedDict[int, str]] = {}

    def add(self, group: Group, request_id: str) -> int:
        """Note that a request is done, and return its index."""
        self._last += 1
        self._groups.setdefault(group, OrderedDict())[self._last] = request_id
        return self._last

    def after(self, group: Group, cursor: int) -> Tuple[List[str], int]:
        """Return the requests that were done after *cursor*, and the next cursor.

        Forgets the requests at or before *cursor*.
        """
        done = self._groups.get(group)
        if done is None:
            return [], cursor
        # A client sends a cursor once it has the response that carried the cursor
        # (docs/protocol.md, "Batch polling"); any later response may have been lost.
        while done and next(iter(done)) <= cursor:
            done.popitem(last=False)
        if not done:
            del self._groups[group]
            return [], cursor
        return list(done.values()), next(reversed(done))

    def discard(self, group: Group, number: int) -> None:
        """Forget a request whose result is gone."""
        done = self._groups.get(group)
        if done is not None and done.pop(number, None) is not None and not done:
            del self._groups[group]


@dataclasses.dataclass(frozen=True)
class Success:
    """The work was done; *value* is a ForwardBackwardOutput, a SampleResponse or a JSON object."""

    value: object


@dataclasses.dataclass(frozen=True)
class Failure:
    """The work failed; *category* is ``"user"`` or ``"server"``.

    *status* is the HTTP status for an endpoint that responds with the failure itself.
    """

    message: str
    category: str
    status: int = 422


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
    group: Optional[Group] = None  # notified of the completion
    number: int = 0  # index of the completion
    on_done: Optional[Callable[[Outcome], None]] = None


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A future that is still pending: request *seq_id* of *owner*, a model or sampler."""

    owner: str
    seq_id: int


class FutureTable:
    """All futures of the server.  Thread-safe.

    Args:
        keep_fetched_s: a result may be fetched again for this long, in case its response is lost
            (clients retry within seconds).
        keep_unfetched_s: a result that is not fetched is dropped after this long.
        max_finished: most unfetched results, and most fetched results, that are kept.  The oldest
            of a kind are dropped first; neither kind displaces the other.
        max_fetched_bytes: most encoded bytes of fetched results that are kept; the newest is kept
            whatever its size.
        max_gone: most ids of dropped results that are remembered.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        *,
        keep_fetched_s: float = 120.0,
        keep_unfetched_s: float = 3600.0,
        max_finished: int = 20_000,
        max_fetched_bytes: int = 256 << 20,
        max_gone: int = 20_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep_fetched_s = keep_fetched_s
        self._keep_unfetched_s = keep_unfetched_s
        self._max_finished = max_finished
        self._max_fetched_bytes = max_fetched_bytes
        self._max_gone = max_gone
        self._clock = clock
        # Guards everything below.  Never held while calling or waiting for anything.
        self._lock = threading.Lock()
        self._pending: Dict[str, _Entry] = {}
        self._unfetched: OrderedDict[str, _Entry] = OrderedDict()  # by time of completion
        self._fetched: OrderedDict[str, _Entry] = OrderedDict()  # by time of first fetch
        self._fetched_bytes = 0
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._completions = Completions()
        self._listeners: Dict[Group, List[threading.Event]] = {}
        self._closing = False

    def create(
        self,
        request_id: str,
        owner: str,
        seq_id: int,
        *,
        group: Optional[Group] = None,
        on_done: Optional[Callable[[Outcome], None]] = None,
    ) -> None:
        """Add a pending future; *group* is notified when it is done.

        With *on_done* the outcome is not kept but passed to this function, in the thread that
        completes the future: usually the engine thread.  It must not block or raise.
        """
        with self._lock:
            self._pending[request_id] = _Entry(owner, seq_id, group=group, on_done=on_done)
            # An id may be used again: `Lane.remove_early` frees the seq_ids of the requests that
            # waited behind a gap.
            self._gone.pop(request_id, None)

    def complete(self, request_id: str, outcome: Outcome) -> None:
        """Settle a future and wake its waiters; nothing happens if it was settled before."""
        with self._lock:
            # The first outcome counts: a request may be cancelled while the engine completes it.
            entry = self._pending.pop(request_id, None)
            if entry is None:
                return
            entry.outcome = outcome
            entry.finished_at = self._clock()
            if entry.on_done is None:
                self._unfetched[request_id] = entry
            events = [] if entry.done is None else [entry.done]
            if entry.group is not None:
                entry.number = self._completions.add(entry.group, request_id)
                events += self._listeners.pop(entry.group, [])
            while len(self._unfetched) > self._max_finished:
                self._drop_locked(next(iter(self._unfetched)))
        # Not under the lock, which the woken threads need.
        for event in events:
            event.set()
        if entry.on_done is not None:
            entry.on_done(outcome)

    def wait(self, request_id: str, timeout_s: float) -> Union[Waiting, Outcome, None]:
        """Return the outcome, blocking for at most *timeout_s* (or until close).

        Returns Waiting if it is still pending then, and None if there is no such future.
        """
        with self._lock:
            # Pending futures first: if the id was used before, its earlier outcome may exist, too.
            entry = self._pending.get(request_id)
            if entry is None:
                finished = self._finished_locked(request_id)
                return None if finished is None else finished.outcome
            # After `close` the Event might never be set.
            if timeout_s <= 0 or self._closing:
                return Waiting(entry.owner, entry.seq_id)
            if entry.done is None:
                entry.done = threading.Event()
            done = entry.done
        done.wait(timeout_s)
        # The outcome is written before the Event is set, and never changed again.
        return entry.outcome or Waiting(entry.owner, entry.seq_id)

    def completed(
        self, group: Group, cursor: int, timeout_s: float
    ) -> Tuple[List[Tuple[str, Outcome]], int]:
        """Return the requests of *group* done after *cursor*, with outcomes, and the next cursor.

        If there are none yet, blocks for at most *timeout_s*, or until close.
        """
        with self._lock:
            done, upto = self._completions.after(group, cursor)
            if done or timeout_s <= 0 or self._closing:
                return self._outcomes_locked(done), upto
            # Registered without releasing the lock after the check, so that no completion between
            # the two is missed.
            event = threading.Event()
            self._listeners.setdefault(group, []).append(event)
        event.wait(timeout_s)
        with self._lock:
            listeners = self._listeners.get(group, [])
            if event in listeners:  # no completion has removed it
                listeners.remove(event)
                if not listeners:
                    del self._listeners[group]
            done, upto = self._completions.after(group, cursor)
            return self._outcomes_locked(done), upto

    def _outcomes_locked(self, request_ids: List[str]) -> List[Tuple[str, Outcome]]:
        found = []
        for request_id in request_ids:
            entry = self._finished_locked(request_id)
            if entry is not None and entry.outcome is not None:
                found.append((request_id, entry.outcome))
        return found

    def _finished_locked(self, request_id: str) -> Optional[_Entry]:
        return self._unfetched.get(request_id) or self._fetched.get(request_id)

    def acknowledge(self, group: Group, request_ids: Iterable[str]) -> None:
        """Drop the results that the client of *group* has; ids of other groups are ignored."""
        with self._lock:
            for request_id in request_ids:
                entry = self._finished_locked(request_id)
                if entry is not None and entry.group == group:
                    self._drop_locked(request_id)

    def drop(self, request_id: str) -> None:
        """Drop a result early; nothing happens if there is none."""
        with self._lock:
            self._drop_locked(request_id)

    def is_gone(self, request_id: str) -> bool:
        """True if there was such a result and it was dropped not too long ago."""
        with self._lock:
            return request_id in self._gone

    def fetched(self, request_id: str, size: int) -> None:
        """Note that the result was sent, in *size* bytes."""
        with self._lock:
            entry = self._unfetched.pop(request_id, None)
            if entry is None:  # gone, or fetched before
                return
            entry.fetched_at = self._clock()
            entry.fetched_bytes = size
            self._fetched[request_id] = entry
            self._fetched_bytes += size
            # The newest result stays whatever its size: its response may still get lost.
            while len(self._fetched) > 1 and (
                self._fetched_bytes > self._max_fetched_bytes
                or len(self._fetched) > self._max_finished
            ):
                self._drop_locked(next(iter(self._fetched)))

    def sweep(self, now: float) -> None:
        """Drop results that have been kept long enough."""
        with self._lock:
            # Both dicts are in order of time, so the first result that is kept ends the search.
            for request_id, entry in list(self._fetched.items()):
                if entry.fetched_at is None or now < entry.fetched_at + self._keep_fetched_s:
                    break
                self._drop_locked(request_id)
            for request_id, entry in list(self._unfetched.items()):
                if now < entry.finished_at + self._keep_unfetched_s:
                    break
                self._drop_locked(request_id)

    def close(self) -> None:
        """Release every waiter; from now on `wait` returns immediately."""
        with self._lock:
            self._closing = True
            # Polls get "try again"; a future with `on_done` is not polled for, so it fails.
            events = [entry.done for entry in self._pending.values() if entry.done is not None]
            for listeners in self._listeners.values():
                events += listeners
            waited_for = [
                request_id
                for request_id, entry in self._pending.items()
                if entry.on_done is not None
            ]
        for event in events:
            event.set()
        for request_id in waited_for:
            self.complete(request_id, Failure("the server was closed", "server", 503))

    def _drop_locked(self, request_id: str) -> None:
        entry = self._unfetched.pop(request_id, None) or self._fetched.pop(request_id, None)
        if entry is None:
            return
        self._fetched_bytes -= entry.fetched_bytes
        if entry.group is not None:
            self._completions.discard(entry.group, entry.number)
        # Remembered for a while, so that a late poll gets 410, after which clients submit a sample
        # again, instead of the 404 of an unknown id (docs/protocol.md, "Lifetime of results").
        self._gone[request_id] = None
        if len(self._gone) > self._max_gone:
            self._gone.popitem(last=False)
