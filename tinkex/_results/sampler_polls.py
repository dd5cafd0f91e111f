"""SamplerPolls: the samples of one sampler that are in flight, and the long poll for them.

See docs/protocol.md, "Batch polling".  The submitting threads add samples, a thread
``tinkex-batch-i`` polls, and the fetching threads report which results they have fetched; all of
these threads belong to the BatchPoller.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

from tinkex._api.futures import read_completions, retrieve_futures
from tinkex._results.backoff import Backoff
from tinkex._results.pending import PendingRequest, SamplerId
from tinkex._results.poll_loop import overdue
from tinkex._transport.request import Reply, Request
from tinkex._transport.server_flags import ABSENT
from tinkex.errors import APIConnectionError, APIStatusError, ResponseDecodeError, TinkexError
from tinkex.futures import APIFuture

if TYPE_CHECKING:
    from tinkex._results.batch_poller import BatchPoller
    from tinkex._results.sample_poller import CancelQueue
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.resources import ClientResources

logger = logging.getLogger(__name__)

ROUTE = "POST retrieve_futures"
_POLL = Request("POST", "/api/v1/retrieve_futures")

#: With nothing in flight, results are acknowledged after this many seconds, if no poll did it
#: before.
ACKNOWLEDGE_AFTER_S = 1.0
#: The timeout of a poll that only acknowledges, in seconds.
ACKNOWLEDGE_TIMEOUT_S = 5.0
#: The timeout of a poll, in seconds.  Servers hold a poll for a shorter time, usually about 30 s;
#: after a timeout, the next poll asks for the same.
READ_TIMEOUT_S = 60.0


class NextPoll(NamedTuple):
    """A poll to send: its cursor, the results to acknowledge, and whether any sample waits."""

    cursor: int
    retrieved: Tuple[str, ...]
    waiting: bool


class CompletionTracker:
    """The samples of one sampler, by request id.  Bookkeeping only: its owner guards it.

    A sample can be done before the response to its submission was read.  So completions of unknown
    ids are kept until every submission that was then in flight is over.  A sample that is still
    unknown after that was cancelled or has taken too long; it is acknowledged without being
    fetched.
    """

    def __init__(self) -> None:
        self.waiting: Dict[str, PendingRequest[Any]] = {}  # in the order of their acceptance
        self._early: Dict[str, Tuple[int, int]] = {}  # size, and how many submissions had begun
        self._fetching: Set[str] = set()
        self._unacknowledged: Set[str] = set()
        self._cursor = 0
        self._acknowledged_cursor = 0

    def expect(self, request_id: str, request: PendingRequest[Any]) -> Optional[int]:
        """Track *request* as waiting; if it is done already, return its result's size instead."""
        early = self._early.pop(request_id, None)
        if early is None:
            self.waiting[request_id] = request
            return None
        self._fetching.add(request_id)
        return early[0]

    def next_poll(self) -> NextPoll:
        """Return the poll to send next."""
        return NextPoll(self._cursor, tuple(sorted(self._unacknowledged)), bool(self.waiting))

    @property
    def is_idle(self) -> bool:
        """True if no sample is waiting, being fetched, or to be acknowledged."""
        return not (self.waiting or self._fetching or self.has_unacknowledged)

    @property
    def has_unacknowledged(self) -> bool:
        """True if a fetched result, or the cursor, is still to be acknowledged."""
        return bool(self._unacknowledged) or self._cursor != self._acknowledged_cursor

    def note_completions(
        self, sent: NextPoll, sizes: Mapping[str, int], cursor: int, begun: int
    ) -> List[Tuple[PendingRequest[Any], int]]:
        """Take in the response to *sent*; return the requests to fetch, with their results' sizes.

        *begun* is the number of submissions so far.
        """
        # Only what *sent* acknowledged: more may have been fetched while the poll was held.
        self._unacknowledged.difference_update(sent.retrieved)
        self._acknowledged_cursor, self._cursor = sent.cursor, cursor
        ready: List[Tuple[PendingRequest[Any], int]] = []
        for request_id, size in sizes.items():
            request = self.waiting.pop(request_id, None)
            if request is not None:
                self._fetching.add(request_id)
                ready.append((request, size))
            # The server repeats each completion until it is acknowledged.
            elif request_id not in self._fetching and request_id not in self._unacknowledged:
                self._early[request_id] = (size, begun)
        return ready

    def drop_unwanted(self, oldest: int) -> None:
        """Acknowledge results that no request waits for.

        *oldest* is the number of the oldest submission in flight.
        """
        unwanted = [name for name, (_, begun) in self._early.items() if begun < oldest]
        for name in unwanted:
            del self._early[name]
        self._unacknowledged.update(unwanted)

    def note_fetched(self, request_id: str) -> None:
        """Have a result acknowledged, because it was fetched or is no longer wanted."""
        self._fetching.discard(request_id)
        self._unacknowledged.add(request_id)


class Submissions:
    """Numbers the submissions of all samplers, and knows which are in flight.  Thread-safe."""

    def __init__(self) -> None:
        # Guards the attributes below.
        self._lock = threading.Lock()
        self._under_way: Dict[int, None] = {}  # in order
        self.begun = 0  # how many have begun so far

    def begin(self) -> int:
        """Begin a submission and return its number."""
        with self._lock:
            self.begun += 1
            self._under_way[self.begun] = None
            return self.begun

    def end(self, number: int) -> None:
        """Mark a submission as over: it has failed, or its accepted sample is tracked."""
        with self._lock:
            del self._under_way[number]

    def oldest(self) -> int:
        """Return the oldest submission in flight; if there is none, the number of the next one."""
        with self._lock:
            return next(iter(self._under_way), self.begun + 1)


class SamplerPolls:
    """The samples of one sampler, and the poll for them.  Thread-safe.

    The poller is an argument, never an attribute, so that both can be garbage-collected.

    Attributes:
        sampler_id: the sampler.
    """

    def __init__(
        self, sampler_id: SamplerId, resources: ClientResources, submissions: Submissions
    ) -> None:
        self.sampler_id = sampler_id
        self._resources = resources
        self._transport = resources.transport
        self._config = resources.transport.config
        self._submissions = submissions
        # When the server last responded to a poll, or when a sample began to wait while no other
        # did (monotonic).  Written by the polling thread, and by `expect` while no sample waits.
        self._last_contact = 0.0
        # Guards the attributes below, except _wake.
        self._lock = threading.Lock()
        self._tracker = CompletionTracker()
        self._polled = False  # a thread polls for the sampler
        self._per_sample = False  # its samples are polled for individually
        self._idle = False  # the polling thread waits for something to poll for
        self._no_progress_s = math.inf  # the shortest no_progress_timeout_s of all its samples
        self._wake = threading.Event()

    # Called by the threads that submit

    def expect(self, request: PendingRequest[Any], poller: BatchPoller) -> None:
        """Track *request*, which the server has accepted, until its result is ready."""
        request_id = request.future.request_id or ""
        limit_s = request.no_progress_timeout_s or self._config.no_progress_timeout_s
        size: Optional[int] = None
        # Atomic with `_stop`, which ends the polling thread under the same lock: either it sees
        # this request, or we start a new thread.
        with self._lock:
            starts = not self._polled
            watched = not self._per_sample and (not starts or poller.may_poll())
            idle = self._idle
            if watched:
                if not self._tracker.waiting:  # time without work does not count as silence
                    self._last_contact = time.monotonic()
                self._no_progress_s = min(self._no_progress_s, limit_s or math.inf)
                size = self._tracker.expect(request_id, request)
                self._polled = True
        if not watched:
            poller.fall_back(request)
            return
        if idle:
            self._wake.set()
        # Outside the lock, which `_withdraw` takes: it is called here if the future is settled.
        if size is None:
            withdraw = functools.partial(self._withdraw, poller.cancels, request_id)
            request.future.on_settled(withdraw)
        else:
            poller.fetch_soon(self, [(request, size)])
        if starts:
            poller.start_poll(self)

    def _withdraw(self, cancels: CancelQueue, request_id: str, future: Any) -> None:
        """Forget a settled future; if it was cancelled, have the server cancel its sample.

        Called in the thread that settles the future.
        """
        with self._lock:
            # If the sample no longer waits, the thread that fetches its result sees the cancel.
            waited = self._tracker.waiting.pop(request_id, None) is not None
        if waited and future.cancelled():
            cancels.put(request_id)

    # Called by the thread that polls

    def poll(self, poller: BatchPoller, channel: AnyChannel) -> None:
        """Poll until no sample waits and all fetched results are acknowledged.

        Raises:
            TinkexError: polling has failed before that; samples may still be waiting.
        """
        backoff = Backoff(self._resources, _POLL)
        while not self._transport.closing.is_set():
            with self._lock:
                sent = self._tracker.next_poll()
                self._idle = not sent.waiting
            if sent.waiting:
                for future, error in self._overdue():
                    poller.fail(future, error)
                pause_s = self._poll_once(sent, poller, channel, backoff)
                if pause_s > 0:  # ends early when the client is closed
                    channel.stopped.wait(pause_s)
            elif not self._was_woken() and self._acknowledge_or_stop(poller, channel):
                return

    def _poll_once(
        self, sent: NextPoll, poller: BatchPoller, channel: AnyChannel, backoff: Backoff
    ) -> float:
        """Poll once; return the pause before the next poll.  An error that it raises ends polling.

        Raises:
            TinkexError: polling cannot continue.
        """
        server, began = self._transport.server, time.monotonic()
        with self._lock:
            limit_s = min(self._config.poll_timeout_s, READ_TIMEOUT_S, self._left_s_locked(began))
        try:
            reply = self.send(sent, channel, max(0.05, limit_s))
        except APIConnectionError as silence:
            return backoff.after_failure(silence, began)
        except APIStatusError as refused:  # the server issues no token at present
            return backoff.after_failure(refused, began, {})
        self._last_contact = now = time.monotonic()
        if reply.status >= 300:
            if reply.status == 408:  # a long poll without news, as for a single request
                return backoff.after_pending(now - began)
            error = self._transport.status_error(_POLL, reply)
            if error.status in ABSENT:  # from now on samples are polled for individually
                server.note_missing(ROUTE, error.status or 404)
            return backoff.after_failure(error, began, {})
        try:
            found, pause_s = self._take(sent, reply, poller)
        except ResponseDecodeError as unreadable:
            if not reply.is_damaged:
                raise
            return backoff.after_failure(unreadable, began, {})
        server.note_present(ROUTE)
        if found:
            backoff.after_news()
            return pause_s
        return max(pause_s, backoff.after_pending(now - began))

    def send(self, poll: NextPoll, channel: AnyChannel, read_timeout_s: float) -> Reply:
        """Send *poll*, without retries.  The server responds immediately if no sample waits."""
        return retrieve_futures(
            self._transport,
            sampling_session_id=self.sampler_id.sampling_session_id,
            clone=self.sampler_id.clone,
            cursor=poll.cursor,
            retrieved=poll.retrieved,
            immediate=not poll.waiting,
            read_timeout_s=read_timeout_s,
            channel=channel,
        )

    def _take(self, sent: NextPoll, reply: Reply, poller: BatchPoller) -> Tuple[bool, float]:
        """Have the samples that are done fetched.

        Returns whether there are any, and the pause before the next poll.
        """
        completions = read_completions(reply)
        # Read outside our lock, so that no lock is nested in it.  The number only grows: an older
        # one drops fewer results.
        oldest = self._submissions.oldest()
        with self._lock:
            ready = self._tracker.note_completions(
                sent, completions.sizes, completions.cursor, self._submissions.begun
            )
            self._tracker.drop_unwanted(oldest)
        return bool(completions.sizes), poller.fetch_soon(self, ready)

    def _was_woken(self) -> bool:
        """Wait until there is something to poll for; return False if nothing comes for a while."""
        woken = self._wake.wait(ACKNOWLEDGE_AFTER_S)
        # A sample that was added just before is seen when the tracker is next read.
        self._wake.clear()
        return woken

    def wake(self) -> None:
        """Have the polling thread check immediately whether the client was closed."""
        self._wake.set()

    def _acknowledge_or_stop(self, poller: BatchPoller, channel: AnyChannel) -> bool:
        """Acknowledge fetched results; return True if there was nothing to do and polling stops."""
        oldest = self._submissions.oldest()
        with self._lock:
            self._tracker.drop_unwanted(oldest)
            poll = self._tracker.next_poll()
            is_due = self._tracker.has_unacknowledged and not poll.waiting
        if not is_due:
            return self._stop(acknowledged=True)
        try:
            reply = self.send(poll, channel, ACKNOWLEDGE_TIMEOUT_S)
            if reply.status < 300:
                self._take(poll, reply, poller)
                return False
            trouble = self._transport.status_error(_POLL, reply).message
        except TinkexError as error:
            trouble = error.message
        logger.debug("could not acknowledge results: %s", trouble)
        return self._stop(acknowledged=False)  # a later poll does it, or the server drops them

    def _stop(self, *, acknowledged: bool) -> bool:
        """Note that no thread polls any more; return False if there still is work."""
        with self._lock:
            if self._tracker.waiting or (acknowledged and not self._tracker.is_idle):
                return False
            self._polled = self._idle = False
            return True

    def abandon(self, *, per_sample: bool) -> List[PendingRequest[Any]]:
        """Note that polling has failed; return the requests that were waiting.

        With *per_sample*, batch polling is over for good: samples are polled for individually.
        """
        with self._lock:  # atomic: a request that is added later finds no thread polling
            self._polled = self._idle = False
            self._per_sample = self._per_sample or per_sample
            left, self._tracker.waiting = self._tracker.waiting, {}
            return list(left.values())

    def last_acknowledgement(self) -> Optional[NextPoll]:
        """Return the poll that acknowledges the last results; None if none is needed."""
        with self._lock:
            if self._per_sample or not self._tracker.has_unacknowledged:
                return None
            return self._tracker.next_poll()._replace(waiting=False)

    def _overdue(self) -> List[Tuple[APIFuture[Any], TinkexError]]:
        """Return the futures that have taken too long, with the error of each."""
        now = time.monotonic()
        with self._lock:
            # Thousands may wait, and this is called before every poll: check each only if one is
            # late.
            late = self._left_s_locked(now) <= 0
            waiting = list(self._tracker.waiting.values()) if late else []
        silent_s = now - self._last_contact
        found = []
        for request in waiting:
            waited_s = now - request.future.entered
            error = overdue(request, self._config, waited_s=waited_s, silent_s=silent_s)
            if error is not None:
                found.append((request.future, error))
        return found

    def _left_s_locked(self, now: float) -> float:
        """Return a lower bound of the seconds until a waiting sample has taken too long."""
        left_s = self._last_contact + self._no_progress_s - now
        oldest = next(iter(self._tracker.waiting.values()), None)  # dicts keep their order
        if oldest is not None and self._config.operation_timeout_s is not None:
            waited_s = now - oldest.future.entered
            left_s = min(left_s, self._config.operation_timeout_s - waited_s)
        return left_s

    # Called by the threads that fetch

    def note_fetched(self, request_id: str, future: object = None) -> None:
        """Note that a result was fetched or is no longer wanted; *future* is not used."""
        with self._lock:
            self._tracker.note_fetched(request_id)
