"""BatchPoller: one long poll waits for all samples (docs/protocol.md, "Batch polling").

For servers that support it, by their flags.  A sample that waits costs no thread: few threads
submit, one per sampler polls, and few fetch finished results.  How few depends on how long a
request takes: one for each millisecond, so that a thousand requests can be made in a second.

Finished results go before new submissions: the threads that submit first help to fetch.  So a
result is late by the requests that are under way, not by thousands of submissions.

Whatever goes wrong with the poll, nothing that waits is lost: samples fall back to per-sample
polling, which also finds the right error for each, or fail together once the server has been silent
for ``max_outage_s``.  A result that the server does not hand out immediately falls back, too: the
threads that fetch have no time to wait.

Threads, all lazy: ``tinkex-submit-i`` and ``tinkex-fetch-i`` (2 to 64), ``tinkex-batch-i`` (one
for each sampler with samples in flight, up to a cap).  The samples of a sampler beyond the cap fall
back immediately: to wait for a thread, they would have to wait for the samples of others.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
import time
from typing import Any, Callable, Dict, List

from tinkex._results.batch_poll import ROUTE, BatchPoll, send_poll
from tinkex._results.cancel_queue import CancelQueue
from tinkex._results.concurrency_gate import SampleGate
from tinkex._results.pause_log import PauseNotices
from tinkex._results.pending import Lease, PendingRequest, SamplerId, ThreadLocalConnections
from tinkex._results.poll_loop import PollLoop
from tinkex._results.sampler_polls import Ready, SamplerPolls, Submissions
from tinkex._runtime.adaptive_pool import AdaptivePool
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._transport.channel import Channel
from tinkex._transport.resources import ClientResources
from tinkex._transport.server_flags import ServerFlags
from tinkex.errors import (
    APIConnectionError,
    APIError,
    ClientClosedError,
    ResultExpiredError,
    TinkexError,
)
from tinkex.futures import APIFuture

logger = logging.getLogger(__name__)

#: Most samplers polled for at a time.
POLL_CAP = 64
#: With more results than this still to be fetched, the next poll waits, in seconds.
MAX_UNFETCHED, UNFETCHED_PAUSE_S = 64, 0.01
#: All acknowledgements at close may take this long together.
LAST_ACKNOWLEDGEMENT_S = 0.5

_IDLE_S = 5.0


class BatchPoller:
    """Submits samples and fetches their results when the server reports that they are ready.

    Thread-safe; nothing blocks but `flush_acknowledgements` and `join`.

    Args:
        resources: everything goes through its transport, whose ``closing`` event ends every wait.
        fall_back: takes over a sample that is to be polled for on its own; must not block.
        fail: settles a future with an error.
        cancels: gets the samples that were cancelled.
        pauses: as for PollLoop.
    """

    def __init__(
        self,
        resources: ClientResources,
        fall_back: Callable[[PendingRequest[Any]], None],
        fail: Callable[[APIFuture[Any], BaseException], None],
        cancels: CancelQueue,
        pauses: PauseNotices,
    ) -> None:
        self._resources = resources
        self._transport = transport = resources.transport
        self._config = transport.config
        self._fall_back = fall_back
        self._fail = fail
        self._cancels = cancels
        self._pauses = pauses
        self._server = transport.server
        self._channels = ThreadLocalConnections(transport)
        self._gate = SampleGate(transport.config.max_unanswered_samples, self._enqueue)
        self._submits = AdaptivePool("tinkex-submit", self._submit)
        self._fetches = AdaptivePool("tinkex-fetch", self._fetch)
        self._polls = WorkerPool("tinkex-batch", POLL_CAP, _IDLE_S)
        self._free_polls = threading.BoundedSemaphore(POLL_CAP)
        self._submissions = Submissions()
        # Guards _samplers, which only grows.
        self._lock = threading.Lock()
        self._samplers: Dict[SamplerId, SamplerPolls] = {}

    def usable(self, flags: ServerFlags) -> bool:
        """True if the server supports this."""
        return flags.sample_use_retrieve_futures and self._server.missing_status(ROUTE) is None

    def submit(self, request: PendingRequest[Any]) -> None:
        """Have *request* sent in its turn, and its future settled."""
        self._gate.enter(request)

    def _enqueue(self, request: PendingRequest[Any]) -> None:
        try:
            self._submits.put((request,))
        except ClientClosedError as error:
            self._fail(request.future, error)

    # Submitting, by tinkex-submit-i

    def _submit(self, request: PendingRequest[Any]) -> None:
        self._fetches.run_waiting()
        future = request.future
        if future.done():  # cancelled while it was queued
            return
        number = self._submissions.begin()
        try:
            with Lease(future, self._channels.get()) as lease:
                request.submit(lease)
            self._expect(request)
        except Exception as error:
            self._fail(future, error)
        finally:
            self._submissions.end(number)

    def _expect(self, request: PendingRequest[Any]) -> None:
        """Wait for the result of *request*, which was accepted."""
        request_id = request.future.request_id or ""
        polls = self._polls_of(request)
        expected = polls.expect(request_id, request, may_start=self._may_start)
        if not expected.watched:
            self._fall_back(request)
            return
        if expected.ready is not None:
            self._fetch_soon([expected.ready])
        else:
            request.future.on_settled(functools.partial(self._withdraw, polls, request_id))
        if expected.starts:
            try:
                self._polls.submit(functools.partial(self._poll_for, polls))
            except ClientClosedError as error:
                self._free_polls.release()
                self._on_poll_failure(polls, error)

    def _may_start(self) -> bool:
        return self._free_polls.acquire(blocking=False)

    def _polls_of(self, request: PendingRequest[Any]) -> SamplerPolls:
        sampler_id = request.sampler_id()
        assert sampler_id is not None
        with self._lock:
            polls = self._samplers.get(sampler_id)
            if polls is None:
                polls = SamplerPolls(sampler_id, self._config, self._submissions)
                self._samplers[sampler_id] = polls
            return polls

    def _withdraw(self, polls: SamplerPolls, request_id: str, future: Any) -> None:
        """In the thread that settles the future: if it was cancelled, have the server cancel it."""
        if polls.withdraw(request_id) and future.cancelled():
            self._cancels.put(request_id)

    # Polling, by tinkex-batch-i

    def _poll_for(self, polls: SamplerPolls) -> None:
        channel = self._channels.get()
        try:
            BatchPoll(self._resources, polls, channel, self._fetch_soon, self._fail).run()
        except Exception as error:
            self._on_poll_failure(polls, error)
        finally:
            self._free_polls.release()

    def _on_poll_failure(self, polls: SamplerPolls, error: Exception) -> None:
        """The poll cannot go on: fail what waits, or fall back to per-sample polling."""
        fails_all = isinstance(error, (APIConnectionError, ClientClosedError)) or (
            isinstance(error, APIError) and error.status == 402
        )
        left = polls.abandon(per_sample=not fails_all)
        if fails_all:
            for request in left:
                self._fail(request.future, copy.copy(error))
            return
        logger.warning(
            "falling back to per-sample polling for %s: %s",
            polls.sampler_id.sampling_session_id,
            error,
            exc_info=None if isinstance(error, TinkexError) else error,
        )
        for request in left:
            self._fall_back(request)

    # Fetching, by tinkex-fetch-i, and by the threads that submit

    def _fetch_soon(self, ready: List[Ready]) -> float:
        """Have *ready* fetched; return the seconds for which no more would be of use."""
        try:
            self._fetches.put(ready)
        except ClientClosedError as error:
            for one in ready:
                self._fail(one.request.future, error)
        return UNFETCHED_PAUSE_S if self._fetches.waiting > MAX_UNFETCHED else 0.0

    def _fetch(self, ready: Ready) -> None:
        polls, request, size = ready
        future = request.future
        request_id = future.request_id or ""
        try:
            if not future.done() and not self._fetch_once(request, size):
                # Acknowledged once it is fetched: the server may drop it then.
                future.on_settled(functools.partial(self._note_settled, polls, request_id))
                self._fall_back(request)
                return
        except ResultExpiredError as lost:
            request.note_lost(lost)
            self._fall_back(request)
        except Exception as error:
            self._fail(future, error)
        polls.note_fetched(request_id)

    def _note_settled(self, polls: SamplerPolls, request_id: str, future: Any) -> None:
        polls.note_fetched(request_id)

    def _fetch_once(self, request: PendingRequest[Any], size: int) -> bool:
        """Ask for the result, once; False if the server did not hand it out."""
        with Lease(request.future, self._channels.get()) as lease:
            loop = PollLoop(self._resources, request, lease.channel, self._pauses, announced=size)
            return loop.try_once()

    # The end

    def close(self) -> None:
        """Let the threads end; returns immediately.  The owner of the futures settles them."""
        self._submits.close()
        self._fetches.close()
        self._polls.close()
        for polls in self._all_samplers():
            polls.wake()

    def flush_acknowledgements(self, deadline: float) -> None:
        """After `close`: acknowledge what was fetched, in one attempt, as far as time allows."""
        now = time.monotonic()
        deadline = min(deadline, now + LAST_ACKNOWLEDGEMENT_S)
        # The caller wakes with its result before the fetching thread has noted that it is fetched.
        self.join(now + (deadline - now) / 2)
        left = [
            (polls, poll)
            for polls in self._all_samplers()
            if (poll := polls.last_acknowledgement()) is not None
        ]
        if not left:
            return
        channel = Channel(self._config, pool_size=1)  # the transport's own are aborted
        try:
            for polls, poll in left:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return
                send_poll(self._transport, polls, poll, channel, left_s)
        except TinkexError as error:
            logger.debug("could not acknowledge the last results: %s", error)
        finally:
            channel.abort()

    def _all_samplers(self) -> List[SamplerPolls]:
        with self._lock:
            return list(self._samplers.values())

    def join(self, deadline: float) -> List[str]:
        """Wait until *deadline* (monotonic) for the threads; return the names of those left."""
        return [name for pool in self._pools for name in pool.join(deadline)]

    @property
    def finalizer_hooks(self) -> List[Callable[[], None]]:
        """Functions that stop the threads from a finalizer."""
        return [pool.finalizer_hook for pool in self._pools]

    @property
    def _pools(self) -> List[WorkerPool]:
        return [self._submits.pool, self._fetches.pool, self._polls]
