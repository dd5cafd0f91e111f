"""SamplerPolls: what is known of the samples of one sampler, and until when they may wait.

No I/O and no threads of its own.  Threads: those that submit add to it, the one that polls takes
from it, those that fetch tell it what they have; `batch_poll` and `batch_poller` are these.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from tinkex._api.futures import Completions
from tinkex._results.completion_tracker import CompletionTracker, NextPoll
from tinkex._results.pending import PendingRequest, SamplerId
from tinkex._results.poll_loop import overdue
from tinkex.config import Config
from tinkex.errors import TinkexError
from tinkex.futures import APIFuture


class Submissions:
    """Numbers the submissions of all samplers, and knows which are under way.  Thread-safe."""

    def __init__(self) -> None:
        # Guards what follows.
        self._lock = threading.Lock()
        self._under_way: Dict[int, None] = {}  # in their order
        self._begun = 0

    def begin(self) -> int:
        """Return the number of a new one."""
        with self._lock:
            self._begun += 1
            self._under_way[self._begun] = None
            return self._begun

    def end(self, number: int) -> None:
        """It has been answered, and what was accepted is expected."""
        with self._lock:
            del self._under_way[number]

    @property
    def begun(self) -> int:
        """How many there were."""
        return self._begun

    def oldest(self) -> int:
        """The first that is under way; the next one to come if none is."""
        with self._lock:
            return next(iter(self._under_way), self._begun + 1)


class Ready(NamedTuple):
    """A result that is there, and its size in bytes; 0 if that is not known."""

    watch: SamplerPolls
    request: PendingRequest[Any]
    size: int


class Expected(NamedTuple):
    """What became of a sample that was accepted.

    Attributes:
        watched: it is waited for; False if it is to be polled for on its own.
        starts: nobody polls for the sampler yet.
        ready: it is done already, and to be fetched.
    """

    watched: bool
    starts: bool = False
    ready: Optional[Ready] = None


class SamplerPolls:
    """The samples of one sampler.  Thread-safe.

    Attributes:
        sampler_id: the sampler.
        last_contact: when the server last answered a poll, or there was first something to poll
            for (monotonic).
    """

    def __init__(self, sampler_id: SamplerId, config: Config, submissions: Submissions) -> None:
        self.sampler_id = sampler_id
        self.last_contact = 0.0
        self._config = config
        self._submissions = submissions
        # Guards what follows, but for _news.
        self._lock = threading.Lock()
        self._tracker = CompletionTracker()
        self._polled = False  # a thread polls for it
        self._given_up = False  # its samples are polled for on their own
        self._resting = False  # its thread waits for something to wait for
        self._no_progress_s = math.inf  # the shortest of all its samples
        self._news = threading.Event()

    # Those who submit

    def expect(
        self, request_id: str, request: PendingRequest[Any], may_start: Callable[[], bool]
    ) -> Expected:
        """Wait for the result of *request*, which was accepted.

        If nobody polls for the sampler, the caller is to have that done, if *may_start* lets it.
        """
        limit_s = request.no_progress_timeout_s or self._config.no_progress_timeout_s
        with self._lock:
            starts = not self._polled
            if self._given_up or (starts and not may_start()):
                return Expected(watched=False)
            if not self._tracker.waiting:
                self.last_contact = time.monotonic()
            self._no_progress_s = min(self._no_progress_s, limit_s or math.inf)
            size = self._tracker.expect(request_id, request)
            self._polled = True
            resting = self._resting
        if resting:
            self._news.set()
        return Expected(True, starts, None if size is None else Ready(self, request, size))

    def withdraw(self, request_id: str) -> bool:
        """Wait for it no more; False if it was not waited for."""
        with self._lock:
            return self._tracker.withdraw(request_id) is not None

    # The one who polls

    def next_poll(self) -> NextPoll:
        """What to ask the server; `rest` if nothing is waited for."""
        with self._lock:
            asked = self._tracker.next_poll()
            self._resting = not asked.waiting
            return asked

    def rest(self, seconds: float) -> bool:
        """Wait for something to wait for; True if there may be."""
        woken = self._news.wait(seconds)
        self._news.clear()
        return woken

    def wake(self) -> None:
        """End a `rest`."""
        self._news.set()

    def told(self, asked: NextPoll, done: Completions) -> List[Ready]:
        """Take the answer to *asked*; return what is to be fetched."""
        oldest = self._submissions.oldest()
        with self._lock:
            ready = self._tracker.told(asked, done.sizes, done.cursor, self._submissions.begun)
            self._tracker.drop_unwanted(oldest)
        return [Ready(self, request, size) for request, size in ready]

    def unreported(self) -> Optional[NextPoll]:
        """What to ask so that the server knows what was fetched; None if it does."""
        oldest = self._submissions.oldest()
        with self._lock:
            self._tracker.drop_unwanted(oldest)
            asked = self._tracker.next_poll()
            if asked.waiting or not self._tracker.unreported:
                return None
            return asked

    def last_report(self) -> Optional[NextPoll]:
        """Like `unreported`, of a watch that is over: whatever is waited for."""
        with self._lock:
            if self._given_up or not self._tracker.unreported:
                return None
            return self._tracker.next_poll()._replace(waiting=False)

    def stop(self, *, unreported: bool = False) -> bool:
        """Nobody polls from now on; False if there is something to poll for, or to report.

        What is *unreported* may stay so.
        """
        with self._lock:
            if self._tracker.waiting or not (unreported or self._tracker.at_rest):
                return False
            self._polled = self._resting = False
            return True

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

    def give_up(self, *, for_good: bool) -> List[PendingRequest[Any]]:
        """Nobody polls from now on, nor, if *for_good*, ever; return what was waited for."""
        with self._lock:
            self._polled = self._resting = False
            self._given_up = self._given_up or for_good
            return self._tracker.take_all()

    # Those who fetch

    def fetched(self, request_id: str) -> None:
        """Its result was fetched, or is not wanted any more."""
        with self._lock:
            self._tracker.fetched(request_id)

    def _limit_s_locked(self, now: float) -> float:
        limit_s = self.last_contact + self._no_progress_s - now
        oldest = next(iter(self._tracker.waiting.values()), None)
        if oldest is not None and self._config.operation_timeout_s is not None:
            waited_s = now - oldest.future.entered
            limit_s = min(limit_s, self._config.operation_timeout_s - waited_s)
        return limit_s
