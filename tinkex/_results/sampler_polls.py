"""SamplerPolls: which samples of one sampler are waited for, and until when they may take.

No I/O and no threads of its own.  The threads that submit add to it, the one that polls takes from
it, and those that fetch report what they have; see `batch_poll` and `batch_poller`.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

from tinkex._api.futures import Completions
from tinkex._results.pending import PendingRequest, SamplerId
from tinkex._results.poll_loop import overdue
from tinkex.config import Config
from tinkex.errors import TinkexError
from tinkex.futures import APIFuture


class NextPoll(NamedTuple):
    """What to send: since which cursor, what to acknowledge, and whether anything is waited for."""

    cursor: int
    retrieved: Tuple[str, ...]
    waiting: bool


class CompletionTracker:
    """The samples of one sampler, by request id.  Bookkeeping only: its owner guards it.

    A sample can be done before the response to its submission was read.  So completions of unknown
    ids are kept until every submission that was under way then is over.  What is still unknown
    after that was cancelled, or has taken too long, and is acknowledged without being fetched.
    """

    def __init__(self) -> None:
        self.waiting: Dict[str, PendingRequest[Any]] = {}  # in the order of their acceptance
        self._early: Dict[str, Tuple[int, int]] = {}  # size, and submissions begun by then
        self._fetching: Set[str] = set()
        self._unacknowledged: Set[str] = set()
        self._cursor = 0
        self._acknowledged_cursor = 0

    def expect(self, request_id: str, request: PendingRequest[Any]) -> Optional[int]:
        """Wait for *request*; if it is done already, return the size of its result instead."""
        early = self._early.pop(request_id, None)
        if early is None:
            self.waiting[request_id] = request
            return None
        self._fetching.add(request_id)
        return early[0]

    def next_poll(self) -> NextPoll:
        """What to send next."""
        return NextPoll(self._cursor, tuple(sorted(self._unacknowledged)), bool(self.waiting))

    @property
    def is_idle(self) -> bool:
        """True if nothing is waited for, being fetched, or to be acknowledged."""
        return not (self.waiting or self._fetching or self.has_unacknowledged)

    @property
    def has_unacknowledged(self) -> bool:
        """True if the server does not know of everything that was taken from it."""
        return bool(self._unacknowledged) or self._cursor != self._acknowledged_cursor

    def note_completions(
        self, sent: NextPoll, sizes: Mapping[str, int], cursor: int, begun: int
    ) -> List[Tuple[PendingRequest[Any], int]]:
        """Take the response to *sent*; return what is to be fetched, with the size of each.

        *begun* is the number of submissions so far.
        """
        self._unacknowledged.difference_update(sent.retrieved)
        self._acknowledged_cursor, self._cursor = sent.cursor, cursor
        ready: List[Tuple[PendingRequest[Any], int]] = []
        for request_id, size in sizes.items():
            request = self.waiting.pop(request_id, None)
            if request is not None:
                self._fetching.add(request_id)
                ready.append((request, size))
            elif request_id not in self._fetching and request_id not in self._unacknowledged:
                self._early[request_id] = (size, begun)
        return ready

    def drop_unwanted(self, oldest: int) -> None:
        """Acknowledge results that no request waits for.

        *oldest* is the first submission under way.
        """
        unwanted = [name for name, (_, begun) in self._early.items() if begun < oldest]
        for name in unwanted:
            del self._early[name]
        self._unacknowledged.update(unwanted)

    def note_fetched(self, request_id: str) -> None:
        """Its result was fetched, or is not wanted any more: acknowledge it."""
        self._fetching.discard(request_id)
        self._unacknowledged.add(request_id)


class Submissions:
    """Numbers the submissions of all samplers, and knows which are under way.  Thread-safe."""

    def __init__(self) -> None:
        # Guards what follows.
        self._lock = threading.Lock()
        self._under_way: Dict[int, None] = {}  # in their order
        self.begun = 0  # how many there were

    def begin(self) -> int:
        """Return the number of a new one."""
        with self._lock:
            self.begun += 1
            self._under_way[self.begun] = None
            return self.begun

    def end(self, number: int) -> None:
        """Its response was read, and what was accepted is expected."""
        with self._lock:
            del self._under_way[number]

    def oldest(self) -> int:
        """The first that is under way; the next one to come if none is."""
        with self._lock:
            return next(iter(self._under_way), self.begun + 1)


class Ready(NamedTuple):
    """A result that can be fetched, and its size in bytes; 0 if that is not known."""

    polls: SamplerPolls
    request: PendingRequest[Any]
    size: int


class Expected(NamedTuple):
    """What became of a sample that was accepted.

    Attributes:
        watched: it is waited for; False if it is to be polled for on its own.
        starts: no thread polls for the sampler yet.
        ready: it is done already, and to be fetched.
    """

    watched: bool
    starts: bool = False
    ready: Optional[Ready] = None


class SamplerPolls:
    """The samples of one sampler.  Thread-safe.

    Attributes:
        sampler_id: the sampler.
        last_contact: when the server last responded to a poll, or there was first something to
            poll for (monotonic).
    """

    def __init__(self, sampler_id: SamplerId, config: Config, submissions: Submissions) -> None:
        self.sampler_id = sampler_id
        self.last_contact = 0.0
        self._config = config
        self._submissions = submissions
        # Guards what follows, but for _wake.
        self._lock = threading.Lock()
        self._tracker = CompletionTracker()
        self._polled = False  # a thread polls for it
        self._per_sample = False  # its samples are polled for individually
        self._idle = False  # its thread waits for something to poll for
        self._no_progress_s = math.inf  # the shortest of all its samples
        self._wake = threading.Event()

    # Called by the threads that submit

    def expect(
        self, request_id: str, request: PendingRequest[Any], may_start: Callable[[], bool]
    ) -> Expected:
        """Wait for the result of *request*, which was accepted.

        If no thread polls for the sampler, the caller is to start one, if *may_start* allows it.
        """
        limit_s = request.no_progress_timeout_s or self._config.no_progress_timeout_s
        with self._lock:
            starts = not self._polled
            if self._per_sample or (starts and not may_start()):
                return Expected(watched=False)
            if not self._tracker.waiting:
                self.last_contact = time.monotonic()
            self._no_progress_s = min(self._no_progress_s, limit_s or math.inf)
            size = self._tracker.expect(request_id, request)
            self._polled = True
            idle = self._idle
        if idle:
            self._wake.set()
        return Expected(True, starts, None if size is None else Ready(self, request, size))

    def withdraw(self, request_id: str) -> bool:
        """Stop waiting for it; False if it was not waited for."""
        with self._lock:
            return self._tracker.waiting.pop(request_id, None) is not None

    # Called by the thread that polls

    def next_poll(self) -> NextPoll:
        """What to send; call `wait_for_samples` if nothing is waited for."""
        with self._lock:
            poll = self._tracker.next_poll()
            self._idle = not poll.waiting
            return poll

    def wait_for_samples(self, seconds: float) -> bool:
        """Block until there is something to poll for; False after *seconds* without it."""
        woken = self._wake.wait(seconds)
        self._wake.clear()
        return woken

    def wake(self) -> None:
        """End `wait_for_samples`."""
        self._wake.set()

    def note_completions(self, sent: NextPoll, completions: Completions) -> List[Ready]:
        """Take the response to *sent*; return what is to be fetched."""
        oldest = self._submissions.oldest()
        with self._lock:
            ready = self._tracker.note_completions(
                sent, completions.sizes, completions.cursor, self._submissions.begun
            )
            self._tracker.drop_unwanted(oldest)
        return [Ready(self, request, size) for request, size in ready]

    def unacknowledged(self) -> Optional[NextPoll]:
        """What to send so that the server knows what was fetched; None if it does."""
        oldest = self._submissions.oldest()
        with self._lock:
            self._tracker.drop_unwanted(oldest)
            poll = self._tracker.next_poll()
            return poll if self._tracker.has_unacknowledged and not poll.waiting else None

    def last_acknowledgement(self) -> Optional[NextPoll]:
        """Like `unacknowledged`, once polling is over, whatever is still waited for."""
        with self._lock:
            if self._per_sample or not self._tracker.has_unacknowledged:
                return None
            return self._tracker.next_poll()._replace(waiting=False)

    def stop(self, *, acknowledge: bool = True) -> bool:
        """Note that no thread polls any more; False if there is something to poll for.

        Without *acknowledge*, results that were fetched may stay unacknowledged.
        """
        with self._lock:
            if self._tracker.waiting or (acknowledge and not self._tracker.is_idle):
                return False
            self._polled = self._idle = False
            return True

    def abandon(self, *, per_sample: bool) -> List[PendingRequest[Any]]:
        """Note that polling has failed; return what was waited for.

        With *per_sample* it is over for good: samples are polled for individually.
        """
        with self._lock:
            self._polled = self._idle = False
            self._per_sample = self._per_sample or per_sample
            left, self._tracker.waiting = self._tracker.waiting, {}
            return list(left.values())

    def read_timeout_s(self) -> float:
        """Seconds until something that is waited for has taken too long, or less."""
        with self._lock:
            return self._limit_s_locked(time.monotonic())

    def overdue(self) -> List[Tuple[APIFuture[Any], TinkexError]]:
        """What has taken too long, with the error of each."""
        now = time.monotonic()
        with self._lock:
            late = self._limit_s_locked(now) <= 0
            waiting = list(self._tracker.waiting.values()) if late else []
        silent_s = now - self.last_contact
        found = []
        for request in waiting:
            waited_s = now - request.future.entered
            error = overdue(request, self._config, waited_s=waited_s, silent_s=silent_s)
            if error is not None:
                found.append((request.future, error))
        return found

    def _limit_s_locked(self, now: float) -> float:
        limit_s = self.last_contact + self._no_progress_s - now
        oldest = next(iter(self._tracker.waiting.values()), None)
        if oldest is not None and self._config.operation_timeout_s is not None:
            waited_s = now - oldest.future.entered
            limit_s = min(limit_s, self._config.operation_timeout_s - waited_s)
        return limit_s

    # Called by the threads that fetch

    def note_fetched(self, request_id: str) -> None:
        """Its result was fetched, or is not wanted any more."""
        with self._lock:
            self._tracker.note_fetched(request_id)
