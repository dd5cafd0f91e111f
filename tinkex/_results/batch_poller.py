"""BatchPoller: one long poll waits for all samples (docs/protocol.md, "Batch polling").

Used if the server's flags announce support.  A waiting sample costs no thread: a few threads
submit, one per sampler polls, and a few fetch finished results.  Their number depends on how long a
request takes: one thread per millisecond, so that a thousand requests can be made in a second.

Finished results take precedence over new submissions: the submitting threads first help to fetch.
So a result waits only for the requests in flight, not for thousands of submissions.

Whatever goes wrong with the poll, no waiting sample is lost: samples fall back to per-sample
polling, which also finds the right error for each, or fail together once the server has been silent
for ``max_outage_s``.  A sample whose result the server does not hand out immediately falls back,
too: the fetching threads have no time to wait.

Threads, all lazy: ``tinkex-submit-i`` and ``tinkex-fetch-i`` (2 to 64), ``tinkex-batch-i`` (one
for each sampler with samples in flight, up to a cap).  The samples of a sampler beyond the cap fall
back immediately: otherwise they would wait for a thread until other samplers' samples are done.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

from tinkex._results.concurrency_gate import SampleGate
from tinkex._results.pending import Lease, PendingRequest, SamplerId
from tinkex._results.sample_poller import SamplePoller
from tinkex._results.sampler_polls import ROUTE, SamplerPolls, Submissions
from tinkex._runtime.adaptive_pool import AdaptivePool
from tinkex._transport.channel import Channel
from tinkex._transport.server_flags import ServerFlags
from tinkex.errors import (
    APIConnectionError,
    APIError,
    ClientClosedError,
    ResultExpiredError,
    TinkexError,
)

if TYPE_CHECKING:
    from tinkex._transport.resources import ClientResources

logger = logging.getLogger(__name__)

#: The most samplers polled for at a time.
POLL_CAP = 64
#: While more than MAX_UNFETCHED results are still to be fetched, the next poll is put off by
#: UNFETCHED_PAUSE_S seconds.
MAX_UNFETCHED, UNFETCHED_PAUSE_S = 64, 0.01
#: All acknowledgements at close may together take this long, in seconds.
LAST_ACKNOWLEDGEMENT_S = 0.5

_IDLE_S = 5.0


class BatchPoller:
    """Submits samples and fetches their results when the server reports that they are ready.

    Thread-safe; only `flush_acknowledgements` blocks.

    Args:
        resources: everything goes through its transport, whose ``closing`` event ends every wait.
        samples: takes over the samples that must be polled for individually.

    Attributes:
        fall_back, fail, cancels: the ``submit``, ``fail`` and ``cancels`` of *samples*.
    """

    def __init__(self, resources: ClientResources, samples: SamplePoller) -> None:
        self._resources = resources
        self._server = resources.transport.server
        self._samples = samples
        self.fall_back, self.fail, self.cancels = samples.submit, samples.fail, samples.cancels
        self._gate = SampleGate(resources.transport.config.max_unanswered_samples)
        self._submits = AdaptivePool(resources.pools, "tinkex-submit")
        self._fetches = AdaptivePool(resources.pools, "tinkex-fetch")
        self._polls = resources.pools.make("tinkex-batch", POLL_CAP, _IDLE_S)
        self._free_polls = threading.BoundedSemaphore(POLL_CAP)
        self._submissions = Submissions()
        # Guards _samplers, which only grows.
        self._lock = threading.Lock()
        self._samplers: Dict[SamplerId, SamplerPolls] = {}

    def usable(self, flags: ServerFlags) -> bool:
        """Return whether the server supports batch polling."""
        return flags.sample_use_retrieve_futures and self._server.missing_status(ROUTE) is None

    def submit(self, request: PendingRequest[Any]) -> None:
        """Have *request* sent when its turn comes, and its future settled."""
        self._gate.enter(request, self._enqueue)

    def _enqueue(self, request: PendingRequest[Any]) -> None:
        try:
            self._submits.put([functools.partial(self._submit, request)])
        except ClientClosedError as error:
            self.fail(request.future, error)

    # Submitting, by tinkex-submit-i

    def _submit(self, request: PendingRequest[Any]) -> None:
        # Finished results first: they must not wait behind thousands of submissions.
        self._fetches.run_waiting()
        future = request.future
        if future.done():  # cancelled while it was queued
            return
        # Until this submission has ended, a completion with an unknown id may be this request's.
        number = self._submissions.begin()
        try:
            with Lease(future, self._samples.channel()) as lease:
                request.submit(lease)
            self._polls_of(request).expect(request, self)
        except Exception as error:
            self.fail(future, error)
        finally:
            self._submissions.end(number)

    def _polls_of(self, request: PendingRequest[Any]) -> SamplerPolls:
        sampler_id = request.sampler_id()
        assert sampler_id is not None
        with self._lock:
            polls = self._samplers.get(sampler_id)
            if polls is None:
                polls = SamplerPolls(sampler_id, self._resources, self._submissions)
                self._samplers[sampler_id] = polls
            return polls

    # Polling, by tinkex-batch-i

    def may_poll(self) -> bool:
        """Reserve a thread for `start_poll`, which must follow; False if none is free."""
        return self._free_polls.acquire(blocking=False)

    def start_poll(self, polls: SamplerPolls) -> None:
        """Have the reserved thread poll for a sampler."""
        try:
            self._polls.submit(functools.partial(self._poll_for, polls))
        except ClientClosedError as error:
            self._free_polls.release()
            self._on_poll_failure(polls, error)

    def _poll_for(self, polls: SamplerPolls) -> None:
        try:
            polls.poll(self, self._samples.channel())
        except Exception as error:  # fall back even after a bug: waiting samples must not hang
            self._on_poll_failure(polls, error)
        finally:
            self._free_polls.release()

    def _on_poll_failure(self, polls: SamplerPolls, error: Exception) -> None:
        """Fail the samples that wait after an error, or fall back to per-sample polling."""
        # Polling for each sample would meet the same outage, closed client or empty account.
        fails_all = isinstance(error, (APIConnectionError, ClientClosedError)) or (
            isinstance(error, APIError) and error.status == 402
        )
        left = polls.abandon(per_sample=not fails_all)
        if fails_all:
            for request in left:  # a copy for each: errors carry the id of their request
                self.fail(request.future, copy.copy(error))
            return
        logger.warning(
            "falling back to per-sample polling for %s: %s",
            polls.sampler_id.sampling_session_id,
            error,
            exc_info=None if isinstance(error, TinkexError) else error,
        )
        for request in left:
            self.fall_back(request)

    # Fetching, by tinkex-fetch-i, and by the threads that submit

    def fetch_soon(
        self, polls: SamplerPolls, ready: List[Tuple[PendingRequest[Any], int]]
    ) -> float:
        """Have the results of *ready* fetched: pairs of a request and its result's size in bytes.

        A size of 0 means unknown.  Returns for how many seconds the next poll should be put off.
        """
        try:
            self._fetches.put([functools.partial(self._fetch, polls, *one) for one in ready])
        except ClientClosedError as error:
            for request, _ in ready:
                self.fail(request.future, error)
        return UNFETCHED_PAUSE_S if self._fetches.waiting > MAX_UNFETCHED else 0.0

    def _fetch(self, polls: SamplerPolls, request: PendingRequest[Any], size: int) -> None:
        future = request.future
        request_id = future.request_id or ""
        try:
            if not future.done() and not self._samples.fetch(request, size):
                # Acknowledge it only once it is fetched: the server may drop it then.
                future.on_settled(functools.partial(polls.note_fetched, request_id))
                self.fall_back(request)
                return
        except ResultExpiredError as lost:  # the SamplePoller decides whether to send it again
            request.note_lost(lost)
            self.fall_back(request)
        except Exception as error:
            self.fail(future, error)
        polls.note_fetched(request_id)

    # The end

    def close(self) -> None:
        """Drop queued work; call it once the pools are closed.  Returns immediately.

        The owner of the futures settles them.
        """
        self._submits.clear()
        self._fetches.clear()
        for polls in self._all_samplers():
            polls.wake()

    def flush_acknowledgements(self, deadline: float) -> None:
        """Acknowledge fetched results, without retries, as far as time allows; after `close`."""
        now = time.monotonic()
        deadline = min(deadline, now + LAST_ACKNOWLEDGEMENT_S)
        # Let the threads end: a caller may have its result before the fetch was noted.
        for pool in (self._submits.pool, self._fetches.pool, self._polls):
            pool.join(now + (deadline - now) / 2)
        left = [
            (polls, poll)
            for polls in self._all_samplers()
            if (poll := polls.last_acknowledgement()) is not None
        ]
        if not left:
            return
        # A new connection, since `close` has aborted the transport's own.
        channel = Channel(self._resources.transport.config, pool_size=1)
        try:
            for polls, poll in left:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return
                polls.send(poll, channel, left_s)
        except TinkexError as error:
            logger.debug("could not acknowledge the last results: %s", error)
        finally:
            channel.abort()

    def _all_samplers(self) -> List[SamplerPolls]:
        with self._lock:
            return list(self._samplers.values())
