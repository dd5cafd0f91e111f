"""BatchPoller: one long poll waits for all samples (docs/protocol.md, "Batch polling").

For servers that say so in their flags.  A sample that waits costs no thread: few threads submit,
one per sampler polls, and few fetch what is done.  How few depends on how long the server takes
to answer: one for each millisecond, so that a thousand requests can be made in a second.

What is done goes before what is to be submitted: those that submit first help to fetch.  So a
result is late by the requests that are under way, not by thousands of submissions.

Whatever goes wrong with the poll, nothing that waits is lost: samples go back to being polled one
by one, which also finds the right error for each, or fail together once the server has been silent
for ``max_outage_s``.  And a result that the server does not hand out at once is polled for alone,
too: those that fetch have no time to wait.

Threads, all lazy: ``tinkex-submit-i`` and ``tinkex-fetch-i`` (2 to 64), ``tinkex-batch-i`` (one
for each sampler with samples in flight, up to a cap).  The samples of a sampler beyond the cap are
polled for alone, at once: to wait for their turn, they would have to wait for those of others.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from typing import Any, Callable, Dict, List

from tinkex._results.batch_poll import ROUTE, BatchPoll, ask
from tinkex._results.cancel_queue import CancelQueue
from tinkex._results.concurrency_gate import SampleGate
from tinkex._results.pause_log import PauseNotices
from tinkex._results.pending import Lease, PendingRequest, SamplerId, ThreadLocalConnections
from tinkex._results.poll_loop import PollLoop
from tinkex._results.sampler_polls import Ready, SamplerPolls, Submissions
from tinkex._runtime.adaptive_pool import AdaptivePool
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._transport.channel import Channel
from tinkex._transport.server_flags import ServerFlags
from tinkex._transport.transport import Transport
from tinkex.errors import (
    APIConnectionError,
    APIError,
    ClientClosedError,
    ResultExpiredError,
    TinkexError,
)
from tinkex.futures import APIFuture

logger = logging.getLogger(__name__)

#: Most samplers polled for at once.
POLL_CAP = 64
#: With so many results still to be fetched, the next ones are asked for after so long, in seconds.
MANY, MANY_PAUSE_S = 64, 0.01
#: All reports at close may take so long together.
LAST_REPORT_S = 0.5

_IDLE_S = 5.0


class BatchPoller:
    """Submits samples and fetches their results when the server says that they are there.

    Thread-safe; nothing blocks but `flush_acknowledgements` and `join`.

    Args:
        transport: everything goes through it; its ``closing`` event ends every wait.
        poll_alone: takes over a sample that is to be polled for on its own; must not block.
        fail: settles a future with an error.
        cancels: is told of samples that nobody waits for.
        pauses: as for PollLoop.
    """

    def __init__(
        self,
        transport: Transport,
        poll_alone: Callable[[PendingRequest[Any]], None],
        fail: Callable[[APIFuture[Any], BaseException], None],
        cancels: CancelQueue,
        pauses: PauseNotices,
    ) -> None:
        self._transport = transport
        self._config = transport.config
        self._poll_alone = poll_alone
        self._fail = fail
        self._cancels = cancels
        self._pauses = pauses
        self._server = transport.server
        self._channels = ThreadLocalConnections(transport)
        self._gate = SampleGate(transport.config.max_unanswered_samples, self._enqueue)
        self._submits = AdaptivePool("tinkex-submit", self._submit)
        self._fetches = AdaptivePool("tinkex-fetch", self._fetch)
        self._polls = WorkerPool("tinkex-batch", POLL_CAP, _IDLE_S)
        self._polled = threading.BoundedSemaphore(POLL_CAP)  # samplers
        self._submissions = Submissions()
        # Guards _watches, which only grows.
        self._lock = threading.Lock()
        self._watches: Dict[SamplerId, SamplerPolls] = {}

    def usable(self, flags: ServerFlags) -> bool:
        """True if the server wants its samples waited for like this."""
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
        if future.done():  # cancelled while it waited its turn
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
        future = request.future
        request_id = future.request_id or ""
        sampler_id = request.sampler_id()
        assert sampler_id is not None
        watch = self._watch_of(sampler_id)
        found = watch.expect(
            request_id, request, may_start=lambda: self._polled.acquire(blocking=False)
        )
        if not found.watched:
            self._poll_alone(request)
            return
        if found.ready is not None:
            self._fetch_soon([found.ready])
        else:
            future.on_settled(lambda settled: self._withdraw(watch, request_id, settled))
        if found.starts:
            try:
                self._polls.submit(lambda: self._poll_for(watch))
            except ClientClosedError as error:
                self._polled.release()
                self._give_up(watch, error)

    def _watch_of(self, sampler_id: SamplerId) -> SamplerPolls:
        with self._lock:
            watch = self._watches.get(sampler_id)
            if watch is None:
                watch = self._watches[sampler_id] = SamplerPolls(
                    sampler_id, self._config, self._submissions
                )
            return watch

    def _withdraw(self, watch: SamplerPolls, request_id: str, future: Any) -> None:
        """In the thread that settles the future: if it was cancelled, tell the server."""
        if watch.withdraw(request_id) and future.cancelled():
            self._cancels.put(request_id)

    # Polling, by tinkex-batch-i

    def _poll_for(self, watch: SamplerPolls) -> None:
        channel = self._channels.get()
        try:
            BatchPoll(self._transport, watch, channel, self._fetch_soon, self._fail).run()
        except Exception as error:
            self._give_up(watch, error)
        finally:
            self._polled.release()

    def _give_up(self, watch: SamplerPolls, error: Exception) -> None:
        """The poll cannot go on: nothing that waits may be forgotten."""
        together = isinstance(error, (APIConnectionError, ClientClosedError)) or (
            isinstance(error, APIError) and error.status == 402
        )
        left = watch.give_up(for_good=not together)
        if together:
            for request in left:
                self._fail(request.future, copy.copy(error))
            return
        logger.warning(
            "falling back to per-sample polling for %s: %s",
            watch.sampler_id.sampling_session_id,
            error,
            exc_info=None if isinstance(error, TinkexError) else error,
        )
        for request in left:
            self._poll_alone(request)

    # Fetching, by tinkex-fetch-i, and by those that submit

    def _fetch_soon(self, ready: List[Ready]) -> float:
        """Have *ready* fetched; return how long more of it would not be needed, in seconds."""
        try:
            self._fetches.put(ready)
        except ClientClosedError as error:
            for one in ready:
                self._fail(one.request.future, error)
        return MANY_PAUSE_S if self._fetches.waiting > MANY else 0.0

    def _fetch(self, ready: Ready) -> None:
        watch, request, size = ready
        future = request.future
        request_id = future.request_id or ""
        try:
            if not future.done() and not self._fetch_once(request, size):
                # To be reported as fetched when it is: the server may drop it then.
                future.on_settled(lambda settled: watch.fetched(request_id))
                self._poll_alone(request)
                return
        except ResultExpiredError as lost:
            request.note_lost(lost)
            self._poll_alone(request)
        except Exception as error:
            self._fail(future, error)
        watch.fetched(request_id)

    def _fetch_once(self, request: PendingRequest[Any], size: int) -> bool:
        """Ask for the result, once; False if the server did not hand it out."""
        with Lease(request.future, self._channels.get()) as lease:
            loop = PollLoop(self._transport, request, lease.channel, self._pauses, announced=size)
            return loop.try_once()

    # The end

    def close(self) -> None:
        """Let the threads end; returns at once.  The owner of the futures settles them."""
        self._submits.close()
        self._fetches.close()
        self._polls.close()
        with self._lock:
            watches = list(self._watches.values())
        for watch in watches:
            watch.wake()

    def flush_acknowledgements(self, deadline: float) -> None:
        """After `close`: report what was fetched and not reported, once, as far as time allows."""
        now = time.monotonic()
        deadline = min(deadline, now + LAST_REPORT_S)
        # Whoever waits for a result wakes before its thread has noted that it was fetched.
        self.join(now + (deadline - now) / 2)
        with self._lock:
            watches = list(self._watches.values())
        reports = [(watch, asked) for watch in watches if (asked := watch.last_report())]
        if not reports:
            return
        channel = Channel(self._config, pool_size=1)  # the transport's own are broken off
        try:
            for watch, asked in reports:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return
                ask(self._transport, watch, asked, channel, left_s)
        except TinkexError as error:
            logger.debug("what was fetched could not be reported: %s", error)
        finally:
            channel.abort()

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
