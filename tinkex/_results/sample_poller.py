"""SamplePoller: submits each sample, and polls for it, in a thread and on a connection of its own.

Samples beyond a cap are queued.  A worker whose future is cancelled is free immediately: its
connection is aborted, and it gets a new one.

Threads: ``tinkex-sample-i``, one per sample in flight, and up to eight ``tinkex-cancel-i`` while
there is something to cancel.  Measurements showed why each sample needs a thread: for work that
completes in order, a few threads are as fast as one per future, but unordered long polls that share
a small pool turned milliseconds into seconds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any, Callable, Optional

from tinkex._api.futures import cancel_future
from tinkex._results.notices import PauseNotices
from tinkex._results.pending import Lease, PendingRequest, ThreadLocalConnections
from tinkex._results.poll_loop import PollLoop
from tinkex._transport.request_errors import forget_frames
from tinkex._transport.server_flags import dynamic_flags_for
from tinkex.errors import ClientClosedError, ResultExpiredError, TinkexError
from tinkex.futures import APIFuture

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.resources import ClientResources

logger = logging.getLogger(__name__)

CANCEL_ROUTE = "POST cancel_future"

_CANCEL_THREADS = 8
#: The most cancels that are queued; further ones are dropped, as the work ends by itself in time.
_MAX_QUEUED = 10_000


class SamplePoller:
    """Submits requests, polls for their results, and settles those that fail.  Thread-safe.

    Args:
        resources: polls go through its transport, whose ``closing`` event ends every wait.
        explain: turns the error of failed work into the one the user gets (e.g. because the
            session was lost); called in a poller thread without locks.
        on_failure: called with each future that is about to fail, and its error; must be quick and
            not raise.

    Attributes:
        cancels: asks the server to cancel samples.
    """

    def __init__(
        self,
        resources: ClientResources,
        explain: Optional[Callable[[TinkexError], TinkexError]],
        on_failure: Optional[Callable[[APIFuture[Any], BaseException], None]],
    ) -> None:
        self._resources = resources
        self._explain = explain
        self._on_failure = on_failure
        self._pauses = PauseNotices()
        self.cancels = CancelQueue(resources)
        cap = resources.transport.config.max_concurrent_samples
        self._workers = resources.pools.make("tinkex-sample", cap)
        self._channels = ThreadLocalConnections(resources.transport)

    def channel(self) -> AnyChannel:
        """Return the calling thread's own connection."""
        return self._channels.get()

    def poll(self, request: PendingRequest[Any], channel: AnyChannel) -> None:
        """Poll until the future of *request* is settled, by any thread, or raise its error."""
        PollLoop(self._resources, request, channel, self._pauses).run()

    def fetch(self, request: PendingRequest[Any], size: int) -> bool:
        """Poll once for a result of *size* bytes; return False if the server withheld it."""
        with Lease(request.future, self.channel()) as lease:
            loop = PollLoop(self._resources, request, lease.channel, self._pauses, announced=size)
            return loop.try_once()

    def limit(self, cap: int) -> None:
        """Allow at most *cap* samples in flight."""
        if self._workers.cap != cap:
            self._workers.resize(max(1, cap))

    def submit(self, request: PendingRequest[Any]) -> None:
        """Have a worker submit *request*, unless it is already accepted, and poll for its result.

        Does not block.
        """
        try:
            self._workers.submit(functools.partial(self._run, request))
        except ClientClosedError as error:
            self.fail(request.future, error)

    def _run(self, request: PendingRequest[Any]) -> None:
        """Submit *request* and poll for its result.  Called on a worker, ``tinkex-sample-i``."""
        future = request.future
        if future.done():  # cancelled while it was queued
            # It is accepted if the batch poller has submitted it and handed it over.
            if request.accepted and future.cancelled():
                self.cancels.put(future.request_id or "")
            return
        try:
            with Lease(future, self.channel()) as lease:
                self._sample(request, lease)
        except Exception as error:
            self.fail_request(request, error)

    def _sample(self, request: PendingRequest[Any], lease: Lease) -> None:
        future = request.future
        while not future.done():
            if request.lost is not None:
                self._wait_to_resubmit(request, request.lost, lease)
                if future.done():
                    return
            if not request.accepted:
                request.submit(lease)
            try:
                self.poll(request, lease.channel)
                return
            except ResultExpiredError as lost:
                request.note_lost(lost)
            finally:  # the poll was aborted, so the server does not know of the cancel yet
                if future.cancelled():
                    self.cancels.put(future.request_id or "")

    def _wait_to_resubmit(
        self, request: PendingRequest[Any], lost: ResultExpiredError, lease: Lease
    ) -> None:
        delay_s = request.retry_after_loss()
        if delay_s is None:
            raise lost
        request.losses += 1
        logger.info("%s; submitting it again in %.1f s", lost, delay_s)
        lease.channel.stopped.wait(delay_s)

    def fail_request(self, request: PendingRequest[Any], error: BaseException) -> None:
        """Settle the future of *request* with *error*, unless the request continues regardless."""
        unhandled = request.on_failure(error)
        if unhandled is not None:
            self.fail(request.future, unhandled)

    def fail(self, future: APIFuture[Any], error: BaseException) -> None:
        """Settle *future* with *error*, or with the error that explains it."""
        if isinstance(error, TinkexError):
            error.request_id = error.request_id or future.request_id
            explained = error if self._explain is None else self._explain(error)
            if explained is not error:
                explained.__cause__ = error
            error = explained
        # Before the waiters wake: they may close the client immediately.
        if self._on_failure is not None and not future.done():
            self._on_failure(future, error)
        if isinstance(error, TinkexError):
            # With its frames the error would keep the request and its data alive, in a cycle.
            logger.debug("%s failed", future.kind, exc_info=error)
            forget_frames(error)
        future.try_set_exception(error)


class CancelQueue:
    """Asks the server to cancel samples that are no longer wanted.  Thread-safe.

    Nothing is sent unless a flag of the server says that it supports this (docs/protocol.md,
    "Cancellation").  Cancels are sent a few at a time, with retries; failures are only logged.
    """

    def __init__(self, resources: ClientResources) -> None:
        self._transport = resources.transport
        self._pool = resources.pools.make("tinkex-cancel", _CANCEL_THREADS, idle_s=1.0)
        self._pool.resize(1)  # until it is known how many the server accepts

    def put(self, request_id: str) -> None:
        """Have the server cancel *request_id*.  Never blocks, never raises."""
        if self._pool.waiting < _MAX_QUEUED:
            with contextlib.suppress(ClientClosedError):  # the session ends with all its work
                self._pool.submit(functools.partial(self._cancel, request_id))

    def _cancel(self, request_id: str) -> None:
        limit = self._limit()
        if limit == 0:
            return
        self._pool.resize(min(_CANCEL_THREADS, limit))
        try:
            cancel_future(self._transport, request_id)
        except TinkexError as error:
            logger.debug("cancelling request %s: %s", request_id, error)
            if error.status in (405, 501):  # 404 is about the request
                self._transport.server.note_missing(CANCEL_ROUTE, error.status)

    def _limit(self) -> int:
        """Return how many cancels the server accepts at a time; 0 if it supports none."""
        try:
            flags = dynamic_flags_for(self._transport)
        except TinkexError as error:
            logger.debug("could not find out whether samples can be cancelled: %s", error)
            return 0
        missing = self._transport.server.missing_status(CANCEL_ROUTE) is not None
        enabled = flags.sample_cancel_enabled and not missing
        return flags.sample_cancel_max_batch_size if enabled else 0
